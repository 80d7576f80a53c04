// What stands between the products of a training step, each in one pass over its data (see `kernels.py`).
//
// Computed in fp32 whatever the type in memory; one thread; the same inputs give the same bytes. Plain loops that a
// compiler turns into vector instructions, and nothing but the language: no headers of torch, no libraries.
//
// Legend: N = tokens, D = model width, F = feed-forward width, H, K = query and key/value heads, G = H / K,
// d = head width, B = rows, T = cells of a row, V = vocabulary, M = rows of logits.

#include "../decoder/bf16.h"

namespace {

// e^x to about 1e-7 relative for x in [-87, 88], outside of it e to the nearer end: 2^n times a polynomial.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float whole = __builtin_rintf(x * 1.44269504f);
    float r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t exponent = (static_cast<int32_t>(whole) + 127) << 23;
    float power;
    std::memcpy(&power, &exponent, 4);
    return p * power;
}

constexpr int64_t CELLS = 16;

using Floats = float __attribute__((vector_size(64)));
using Words = uint32_t __attribute__((vector_size(64)));
using Halves = uint16_t __attribute__((vector_size(32)));

inline Floats load_16(const float *from) {
    Floats values;
    std::memcpy(&values, from, 64);
    return values;
}
inline Floats load_16(const bf16 *from) {
    Halves halves;
    std::memcpy(&halves, from, 32);
    return reinterpret_cast<Floats>(__builtin_convertvector(halves, Words) << 16);
}

// The largest of n values. In vectors by hand: compilers keep the order of comparisons where they could be NaN.
template <typename T>
inline float largest(const T *values, int64_t n) {
    float most = load(values[0]);
    int64_t whole = n - n % 16;
    if (whole) {
        Floats lanes = load_16(values);
        for (int64_t j = 16; j < whole; j += 16) {
            Floats others = load_16(values + j);
            lanes = others > lanes ? others : lanes;
        }
        for (int64_t l = 0; l < 16; ++l) most = lanes[l] > most ? lanes[l] : most;
    }
    for (int64_t j = whole; j < n; ++j) {
        float value = load(values[j]);
        most = value > most ? value : most;
    }
    return most;
}

// Adds `added` [N, D] to x, where given; out = x over the root of its mean square, inverse [N] = one over that root.
template <typename T>
void norm(float *x, const T *added, T *out, float *inverse, int64_t n, int64_t d, float epsilon) {
    for (int64_t i = 0; i < n; ++i, x += d, out += d) {
        float squares = 0.0f;
        if (added) {
            for (int64_t j = 0; j < d; ++j) {
                float value = x[j] + load(added[j]);
                x[j] = value;
                squares += value * value;
            }
            added += d;
        } else {
            for (int64_t j = 0; j < d; ++j) squares += x[j] * x[j];
        }
        float factor = root_of_inverse(squares / static_cast<float>(d) + epsilon);
        inverse[i] = factor;
        for (int64_t j = 0; j < d; ++j) store(out + j, x[j] * factor);
    }
}

// Through y = x * inverse: grad += (dy - y mean(dy y)) * inverse; `rounded` receives the sum in the type of products.
template <typename T>
void norm_backward(const T *dy, const T *y, const float *inverse, float *grad, T *rounded, int64_t n, int64_t d) {
    for (int64_t i = 0; i < n; ++i, dy += d, y += d, grad += d, rounded += d) {
        float dot = 0.0f;
        for (int64_t j = 0; j < d; ++j) dot += load(dy[j]) * load(y[j]);
        float mean = dot / static_cast<float>(d), factor = inverse[i];
        for (int64_t j = 0; j < d; ++j) {
            float value = grad[j] + (load(dy[j]) - load(y[j]) * mean) * factor;
            grad[j] = value;
            store(rounded + j, value);
        }
    }
}

// gate and up side by side [N, 2F] -> silu(gate) * up [N, F].
template <typename T>
void swiglu(const T *gate_up, T *out, int64_t n, int64_t f) {
    for (int64_t i = 0; i < n; ++i, gate_up += 2 * f, out += f) {
        const T *up = gate_up + f;
        for (int64_t j = 0; j < f; ++j) {
            float gate = load(gate_up[j]);
            store(out + j, gate / (1.0f + exponential(-gate)) * load(up[j]));
        }
    }
}

// The gradient of gate and up [N, 2F], from that of the product [N, F].
template <typename T>
void swiglu_backward(const T *gate_up, const T *grad, T *__restrict grad_gate_up, int64_t n, int64_t f) {
    for (int64_t i = 0; i < n; ++i, gate_up += 2 * f, grad_gate_up += 2 * f, grad += f) {
        const T *up = gate_up + f;
        T *__restrict grad_up = grad_gate_up + f;
        for (int64_t j = 0; j < f; ++j) {
            float gate = load(gate_up[j]), sigmoid = 1.0f / (1.0f + exponential(-gate)), g = load(grad[j]);
            store(grad_up + j, g * gate * sigmoid);
            store(grad_gate_up + j, g * load(up[j]) * sigmoid * (1.0f + gate * (1.0f - sigmoid)));
        }
    }
}

// One head of one token: both halves of d turned by the angles of a position, times `scale`.
template <typename T>
inline void turn(const T *in, T *out, const float *cos, const float *sin, float scale, float way, int64_t half) {
    for (int64_t j = 0; j < half; ++j) {
        float first = load(in[j]), second = load(in[half + j]), c = cos[j] * scale, s = sin[j] * scale * way;
        store(out + j, first * c - second * s);
        store(out + half + j, second * c + first * s);
    }
}

// Rows of tokens [N, (H + 2K) d] -> q [B, K, G, T, d], turned and scaled, k [B, K, T, d], turned, v [B, K, T, d].
// Row b has `length[b]` tokens from `start[b]` on; the cells behind them become 0. cos, sin: [T, d / 2].
template <typename T>
void spread(const T *qkv, const int64_t *start, const int64_t *length, const float *cos, const float *sin, T *q, T *k,
            T *v, int64_t b, int64_t t, int64_t heads, int64_t kv_heads, int64_t d, float scale) {
    int64_t width = (heads + 2 * kv_heads) * d, half = d / 2;
    std::memset(q, 0, sizeof(T) * b * heads * t * d);
    std::memset(k, 0, sizeof(T) * b * kv_heads * t * d);
    std::memset(v, 0, sizeof(T) * b * kv_heads * t * d);
    for (int64_t row = 0; row < b; ++row) {
        for (int64_t at = 0; at < length[row]; ++at) {
            const T *token = qkv + (start[row] + at) * width;
            const float *c = cos + at * half, *s = sin + at * half;
            for (int64_t h = 0; h < heads; ++h)
                turn(token + h * d, q + ((row * heads + h) * t + at) * d, c, s, scale, 1.0f, half);
            for (int64_t h = 0; h < kv_heads; ++h) {
                int64_t cell = ((row * kv_heads + h) * t + at) * d;
                turn(token + (heads + h) * d, k + cell, c, s, 1.0f, 1.0f, half);
                std::memcpy(v + cell, token + (heads + kv_heads + h) * d, sizeof(T) * d);
            }
        }
    }
}

// The way back of `spread` for gradients.
template <typename T>
void gather(T *qkv, const int64_t *start, const int64_t *length, const float *cos, const float *sin, const T *q,
            const T *k, const T *v, int64_t b, int64_t t, int64_t heads, int64_t kv_heads, int64_t d, float scale) {
    int64_t width = (heads + 2 * kv_heads) * d, half = d / 2;
    for (int64_t row = 0; row < b; ++row) {
        for (int64_t at = 0; at < length[row]; ++at) {
            T *token = qkv + (start[row] + at) * width;
            const float *c = cos + at * half, *s = sin + at * half;
            for (int64_t h = 0; h < heads; ++h)
                turn(q + ((row * heads + h) * t + at) * d, token + h * d, c, s, scale, -1.0f, half);
            for (int64_t h = 0; h < kv_heads; ++h) {
                int64_t cell = ((row * kv_heads + h) * t + at) * d;
                turn(k + cell, token + (heads + h) * d, c, s, 1.0f, -1.0f, half);
                std::memcpy(token + (heads + kv_heads + h) * d, v + cell, sizeof(T) * d);
            }
        }
    }
}

// [B, H, T, d] -> the tokens of each row in [N, H d].
template <typename T>
void merge(const T *cells, const int64_t *start, const int64_t *length, T *tokens, int64_t b, int64_t t, int64_t heads,
           int64_t d) {
    for (int64_t row = 0; row < b; ++row)
        for (int64_t h = 0; h < heads; ++h, cells += t * d)
            for (int64_t at = 0; at < length[row]; ++at)
                std::memcpy(tokens + ((start[row] + at) * heads + h) * d, cells + at * d, sizeof(T) * d);
}

// The way back, zeros behind each row.
template <typename T>
void part(T *cells, const int64_t *start, const int64_t *length, const T *tokens, int64_t b, int64_t t, int64_t heads,
          int64_t d) {
    std::memset(cells, 0, sizeof(T) * b * heads * t * d);
    for (int64_t row = 0; row < b; ++row)
        for (int64_t h = 0; h < heads; ++h, cells += t * d)
            for (int64_t at = 0; at < length[row]; ++at)
                std::memcpy(cells + at * d, tokens + ((start[row] + at) * heads + h) * d, sizeof(T) * d);
}

// Each of `blocks` [T, T] of scores becomes the weights of causal attention, in place. T is a multiple of CELLS: a row is
// worked on in whole vectors, a little beyond what it may see.
template <typename T>
void softmax(T *scores, int64_t blocks, int64_t t) {
    for (int64_t i = 0; i < blocks * t; ++i, scores += t) {
        int64_t seen = i % t + 1, whole = (seen + CELLS - 1) / CELLS * CELLS;
        float most = largest(scores, seen), total = 0.0f, row[whole];
        for (int64_t j = 0; j < whole; ++j) {
            float value = exponential(load(scores[j]) - most);
            row[j] = j < seen ? value : 0.0f;
            total += row[j];
        }
        float factor = 1.0f / total;
        for (int64_t j = 0; j < whole; ++j) store(scores + j, row[j] * factor);
        std::memset(scores + whole, 0, sizeof(T) * (t - whole));
    }
}

// The gradient of the scores, in the place of that of the weights. What may not be seen has weight 0.
template <typename T>
void softmax_backward(T *grad, const T *weights, int64_t blocks, int64_t t) {
    for (int64_t i = 0; i < blocks * t; ++i, grad += t, weights += t) {
        int64_t whole = (i % t + CELLS) / CELLS * CELLS;
        float dot = 0.0f;
        for (int64_t j = 0; j < whole; ++j) dot += load(grad[j]) * load(weights[j]);
        for (int64_t j = 0; j < whole; ++j) store(grad + j, load(weights[j]) * (load(grad[j]) - dot));
        std::memset(grad + whole, 0, sizeof(T) * (t - whole));
    }
}

// Of each row of logits [M, V]: the negative log-probability of its target, and whether no other was held more likely.
// The gradient of weight * nll comes in the place of the logits.
template <typename T>
void loss(T *logits, const int64_t *target, const float *weight, float *nll, bool *right, int64_t m, int64_t v) {
    for (int64_t i = 0; i < m; ++i, logits += v) {
        float most = largest(logits, v), wanted = load(logits[target[i]]), total = 0.0f;
        for (int64_t j = 0; j < v; ++j) total += exponential(load(logits[j]) - most);
        nll[i] = __builtin_logf(total) + most - wanted;
        right[i] = wanted == most;
        float factor = weight[i] / total;
        for (int64_t j = 0; j < v; ++j) store(logits + j, exponential(load(logits[j]) - most) * factor);
        store(logits + target[i], weight[i] * (exponential(wanted - most) / total - 1.0f));
    }
}

}  // namespace

// Each function for a type in memory, by a plain name.
#define EXPORT(T, NAME)                                                                                                \
    void norm_##NAME(float *x, const T *added, T *out, float *inverse, int64_t n, int64_t d, float epsilon) {          \
        norm(x, added, out, inverse, n, d, epsilon);                                                                   \
    }                                                                                                                  \
    void norm_backward_##NAME(const T *dy, const T *y, const float *inverse, float *grad, T *rounded, int64_t n,       \
                              int64_t d) {                                                                             \
        norm_backward(dy, y, inverse, grad, rounded, n, d);                                                            \
    }                                                                                                                  \
    void swiglu_##NAME(const T *gate_up, T *out, int64_t n, int64_t f) { swiglu(gate_up, out, n, f); }                 \
    void swiglu_backward_##NAME(const T *gate_up, const T *grad, T *grad_gate_up, int64_t n, int64_t f) {              \
        swiglu_backward(gate_up, grad, grad_gate_up, n, f);                                                            \
    }                                                                                                                  \
    void spread_##NAME(const T *qkv, const int64_t *start, const int64_t *length, const float *cos, const float *sin,  \
                       T *q, T *k, T *v, int64_t b, int64_t t, int64_t heads, int64_t kv_heads, int64_t d,             \
                       float scale) {                                                                                  \
        spread(qkv, start, length, cos, sin, q, k, v, b, t, heads, kv_heads, d, scale);                                \
    }                                                                                                                  \
    void gather_##NAME(T *qkv, const int64_t *start, const int64_t *length, const float *cos, const float *sin,        \
                       const T *q, const T *k, const T *v, int64_t b, int64_t t, int64_t heads, int64_t kv_heads,      \
                       int64_t d, float scale) {                                                                       \
        gather(qkv, start, length, cos, sin, q, k, v, b, t, heads, kv_heads, d, scale);                                \
    }                                                                                                                  \
    void merge_##NAME(const T *cells, const int64_t *start, const int64_t *length, T *tokens, int64_t b, int64_t t,    \
                      int64_t heads, int64_t d) {                                                                      \
        merge(cells, start, length, tokens, b, t, heads, d);                                                           \
    }                                                                                                                  \
    void part_##NAME(T *cells, const int64_t *start, const int64_t *length, const T *tokens, int64_t b, int64_t t,     \
                     int64_t heads, int64_t d) {                                                                       \
        part(cells, start, length, tokens, b, t, heads, d);                                                            \
    }                                                                                                                  \
    void softmax_##NAME(T *scores, int64_t blocks, int64_t t) { softmax(scores, blocks, t); }                          \
    void softmax_backward_##NAME(T *grad, const T *weights, int64_t blocks, int64_t t) {                               \
        softmax_backward(grad, weights, blocks, t);                                                                    \
    }                                                                                                                  \
    void loss_##NAME(T *logits, const int64_t *target, const float *weight, float *nll, bool *right, int64_t m,        \
                     int64_t v) {                                                                                      \
        loss(logits, target, weight, nll, right, m, v);                                                                \
    }

extern "C" {
EXPORT(float, float32)
EXPORT(bf16, bfloat16)
}

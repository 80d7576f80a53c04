// The layers of a Llama in training, forward and backward, on processors that multiply bf16 (AMX, AVX-512): what a step
// is, whatever it learns. step.cpp learns adapters, whole.cpp all weights.
//
// Layers are walked in chunks of tokens that stay in the cache. What comes of a token depends on its own row alone. Behind
// its attention the last layer is computed for the tokens that predict, the late ones: others are of no use from there on.
//
// Legend: N = tokens, L = late ones, those of a piece rounded up to a block, D = model width, F = feed-forward width, H, K = query and key/value heads, d = head width,
// W = (H + 2K) d, I, O = inputs and outputs of a site, M = weighed positions, V = vocabulary, T = tokens of a row.

#pragma once

#include <optional>
#include <vector>

#include "attention.h"

extern "C" {

// What a step reads, and where its losses go.
struct Work {
    int64_t tokens, rows, positions;  // tokens: a multiple of 32
    const int64_t *token_ids;               // [N]
    const int64_t *row_start, *row_length;  // [rows]
    const int64_t *predicting, *target;     // [M], predicting: ascending, each token once at most
    const float *weight;                    // [M]
    float *nll;   // out: [M]
    bool *right;  // out: [M]
    uint8_t *memory;
};

}  // extern "C"

namespace {

constexpr int64_t CHUNK = 256;  // tokens that go through products together: their states stay in the cache

// Rows of panels that are read side by side: an odd number of blocks, so that their lines do not all compete for the same
// half of the places of the cache.
inline int64_t uneven(int64_t rows) { return rows | SIDE; }

// For `by_panels_written`.
inline int64_t one_by_one(int64_t panel) { return panel; }
inline void nothing(int64_t, int64_t) {}

// What the way back of a layer needs. Of the last one, `feed_normed`, `feed_inverse` and `gate_up` have L tokens.
struct Saved {
    Panels normed, qkv, attention, feed_normed, gate_up;  // [N, D], [N, W] turned, [N, H d], [N, D], [N, 2F]
    Panels grad_qkv;                                      // [N, W]: in the place of `gate_up`, when that has been read
    float *inverse, *feed_inverse;                        // [N]
    Softmax softmax;
};

// `Self` adds to it, for site `index` (four a layer) and `tokens` tokens from `first` on, where panels given begin:
//   SPAN                                             tokens it learns from at once
//   forward(index, in, first, tokens, place, write)  the site's outputs, as `by_panels_written` gives them
//   backward(index, gy, in, first, tokens, write)    the gradient of its inputs; `in` is there when all is written
//   learn(index, gy, in, tokens)                     what it learns of a span, whose panels begin there
//   embed(), score(), embed_backward()               both ends: x; the loss, and grad from it; what the embedding learns
template <typename Self>
struct Layers {
    const Model &m;
    const Work &work;
    const int64_t n, wide, mixed;
    Arena arena;
    int64_t longest = 0, late = 0;
    std::vector<int32_t> turn_of;   // by tokens: its place in its row, or -1
    std::vector<int64_t> late_of;   // by tokens: its row among the late ones, or -1
    std::vector<int64_t> token_of;  // by rows of late ones: which token it is, or -1 where a block is filled up
    std::vector<Saved> saved;
    std::optional<Attention> attention;
    float *x, *grad, *inverse, *partial;  // x: [N, D], grad: of x
    Panels out, between;                  // grad in bf16, behind a layer and within
    Panels product, grad_wide;            // of a span
    Panels grad_normed, grad_mixed;       // of a chunk, of all
    Panels attended;                      // what late tokens attend to in the last layer, [L, H d]
    alignas(64) float c[BLOCK];

    // `starts`: tokens at which pieces begin, ascending; a block of late ones has those of one piece.
    Layers(const Model &model, const Work &given, const std::vector<int64_t> &starts)
        : m(model), work(given), n(given.tokens), wide((m.heads + 2 * m.kv_heads) * m.head_width),
          mixed(m.heads * m.head_width), arena{given.memory}, turn_of(n, -1), late_of(n, -1) {
        for (int64_t row = 0; row < work.rows; ++row) {
            longest = work.row_length[row] > longest ? work.row_length[row] : longest;
            for (int64_t t = 0; t < work.row_length[row]; ++t) turn_of[work.row_start[row] + t] = t;
        }
        size_t piece = 0;
        for (int64_t i = 0; i < work.positions; ++i) {
            const int64_t token = work.predicting[i];
            if (piece < starts.size() && token >= starts[piece]) token_of.resize(rounded_up(token_of.size()), -1);
            while (piece < starts.size() && token >= starts[piece]) ++piece;
            late_of[token] = token_of.size();
            token_of.push_back(token);
        }
        late = rounded_up(token_of.size());
        token_of.resize(late, -1);
        const int64_t slack = n + SIDE;  // attention reads beyond a row
        const int64_t chunk = n < CHUNK ? n : CHUNK, span = n < Self::SPAN ? n : Self::SPAN;
        for (int64_t i = 0; i < m.layers; ++i) {
            Saved s{};
            const int64_t fed = i + 1 < m.layers ? n : late;
            s.normed = arena.panels(uneven(n), m.width);
            s.qkv = arena.panels(uneven(slack), wide);
            s.attention = arena.panels(uneven(n), mixed);
            s.feed_normed = arena.panels(uneven(fed), m.width);
            const int64_t of_gate_up = uneven(fed) * 2 * m.feed_width, of_qkv = uneven(n) * wide;
            s.gate_up = {arena.take<bf16>(of_gate_up > of_qkv ? of_gate_up : of_qkv), uneven(fed)};
            s.grad_qkv = {s.gate_up.data, uneven(n)};
            s.inverse = arena.take<float>(n);
            s.feed_inverse = arena.take<float>(fed);
            s.softmax = {arena.take<float>(n * m.heads), arena.take<float>(n * m.heads), n};
            saved.push_back(s);
        }
        x = arena.take<float>(n * m.width);
        grad = arena.take<float>(n * m.width);
        inverse = arena.take<float>(n);
        partial = arena.take<float>(CHUNK * SIDE);
        out = arena.panels(uneven(n), m.width);
        between = Self::SPAN > CHUNK ? arena.panels(uneven(n), m.width) : out;  // for what is learned when both are there
        product = arena.panels(uneven(span), m.feed_width);
        grad_wide = arena.panels(uneven(span), 2 * m.feed_width);
        grad_normed = arena.panels(uneven(chunk), m.width);
        grad_mixed = arena.panels(uneven(slack), mixed);
        attended = arena.panels(uneven(late), mixed);
        attention.emplace(m, longest, arena);
    }

    Self &self() { return static_cast<Self &>(*this); }

    const Site &site_at(int64_t index) const { return m.layer[index / 4].sites[index % 4]; }

    // Whether it is given late tokens alone.
    bool is_late(int64_t index) const { return index > 4 * (m.layers - 1); }
    int64_t tokens_of(int64_t index) const { return is_late(index) ? late : n; }

    // What puts blocks into panels.
    static auto into(Panels to) {
        return [to](int64_t panel, int64_t at, int64_t i, const float *sums) {
            store_32(to.block(panel, at + i), _mm512_load_ps(sums), _mm512_load_ps(sums + 16));
        };
    }

    // -- tokens a chunk at a time, and as many of them as are learned from at once

    // All `tokens` in spans of about the same size, up to SPAN: of more tokens a span may be smaller than of fewer.
    static int64_t span_of(int64_t tokens) {
        const int64_t spans = (tokens + Self::SPAN - 1) / Self::SPAN, even = (tokens + spans - 1) / spans;
        return (even + CHUNK - 1) / CHUNK * CHUNK;
    }

    // work(first token, its place in its span, tokens)
    template <typename Do>
    void by_chunks(int64_t from, int64_t to, Do work) {
        for (int64_t first = from; first < to; first += CHUNK)
            work(first, first - from, first + CHUNK < to ? CHUNK : to - first);
    }

    // Where a span of site `index` from `first` on is to end, at `end` or before; `Self` may say otherwise.
    int64_t end_of_span(int64_t, int64_t, int64_t end) const { return end; }

    // Of the tokens of site `index`: work(...) of the chunks of a span, then learn(its first token, its tokens).
    template <typename Do, typename Learn>
    void by_spans(int64_t index, Do work, Learn learn) {
        const int64_t all = tokens_of(index), span = all ? span_of(all) : 0;
        for (int64_t first = 0, end; first < all; first = end) {
            end = self().end_of_span(index, first, first + span < all ? first + span : all);
            by_chunks(first, end, work);
            learn(first, end - first);
        }
    }

    // -- what stands between products

    // Through `normalise`, grad += (dy - y mean(dy y)) * inverse; the sum in bf16 comes into `to`.
    void leave_norm(Panels dy, Panels y, const float *inverses, int64_t first, int64_t tokens, Panels to) {
        const int64_t d = m.width;
        for (int64_t i = 0; i < tokens; ++i) {
            float *row = grad + (first + i) * d;
            __m512 along = _mm512_setzero_ps();
            for (int64_t j = 0; j < d; j += SIDE)
                along = _mm512_dpbf16_ps(along, load_32(dy.block(j / SIDE, i)), load_32(y.block(j / SIDE, i)));
            const __m512 mean = _mm512_set1_ps(sum(along) / static_cast<float>(d));
            const __m512 factor = _mm512_set1_ps(inverses[first + i]);
            for (int64_t j = 0; j < d; j += SIDE) {
                __m512 value[2];
                for (int64_t half = 0; half < 2; ++half) {
                    float *at = row + j + 16 * half;
                    const __m512 g = load_low(dy.block(j / SIDE, i) + 16 * half);
                    const __m512 v = load_low(y.block(j / SIDE, i) + 16 * half);
                    value[half] = _mm512_fmadd_ps(_mm512_fnmadd_ps(v, mean, g), factor, _mm512_loadu_ps(at));
                    _mm512_storeu_ps(at, value[half]);
                }
                store_32(to.block(j / SIDE, first + i), value[0], value[1]);
            }
        }
    }

    // What takes the gradient of gate's product: gives that of gate and up, and the product again, from token `at_span`
    // of their span on.
    auto into_gate(Panels gate_up, int64_t at_span) {
        const int64_t half_panels = m.feed_width / SIDE;
        return [again_to = product.from(at_span), to = grad_wide.from(at_span), gate_up, half_panels,
                one = _mm512_set1_ps(1.0f)](int64_t panel, int64_t at, int64_t i, const float *sums) {
            const int64_t up_panel = panel + half_panels;
            __m512 again[2], of_gate[2], of_up[2];
            for (int64_t half = 0; half < 2; ++half) {
                const __m512 value = load_low(gate_up.block(panel, at + i) + 16 * half);
                const __m512 other = load_low(gate_up.block(up_panel, at + i) + 16 * half);
                const __m512 given = _mm512_load_ps(sums + 16 * half), share = sigmoid(value);
                const __m512 swish = _mm512_mul_ps(value, share);
                const __m512 slope = _mm512_fmadd_ps(swish, _mm512_sub_ps(one, share), share);
                again[half] = _mm512_mul_ps(swish, other);
                of_up[half] = _mm512_mul_ps(given, swish);
                of_gate[half] = _mm512_mul_ps(_mm512_mul_ps(given, other), slope);
            }
            store_32(again_to.block(panel, at + i), again[0], again[1]);
            store_32(to.block(panel, at + i), of_gate[0], of_gate[1]);
            store_32(to.block(up_panel, at + i), of_up[0], of_up[1]);
        };
    }

    // What adds blocks to rows of x from token `first` on.
    auto onto_x(int64_t first) {
        return [this, first](int64_t panel, int64_t at, int64_t i, const float *sums) {
            float *to = x + (first + at + i) * m.width + panel * SIDE;
            _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), _mm512_load_ps(sums)));
            _mm512_storeu_ps(to + 16, _mm512_add_ps(_mm512_loadu_ps(to + 16), _mm512_load_ps(sums + 16)));
        };
    }

    // gate and up side by side, so that their product can be written with them.
    void feed(int64_t layer, Panels in, Panels gate_up, int64_t first, int64_t tokens) {
        const int64_t half = m.feed_width / SIDE;
        const auto place = [half](int64_t walked) { return walked / 2 + walked % 2 * half; };
        self().forward(4 * layer + 2, in, first, tokens, place,
                       [&, write = into(gate_up)](int64_t panel, int64_t at, int64_t i, const float *sums) {
                           write(panel, at, i, sums);
                           if (panel < half) return;
                           const bf16 *g = gate_up.block(panel - half, at + i), *up = gate_up.block(panel, at + i);
                           store_32(product.block(panel - half, at + i), gated(load_low(g), load_low(up)),
                                    gated(load_low(g + 16), load_low(up + 16)));
                       });
    }

    // -- late tokens

    // Their x, and what they attend to: of others nothing is needed any more.
    void leave_others(Panels all) {
        for (int64_t at = 0; at < late; ++at) {
            const int64_t token = token_of[at];  // at `at` or behind it
            move_row(x, token, at);
            move_row(all, token, attended, at, mixed);
        }
    }

    // Their gradients become those of all tokens: others have none.
    void join_others() {
        for (int64_t token = n; token-- > 0;) {
            const int64_t at = late_of[token];
            move_row(grad, at, token);
            move_row(grad_mixed, at, grad_mixed, token, mixed);
        }
    }

    // Zeros from where `row` is none.
    void move_row(float *of, int64_t row, int64_t to_row) const {
        if (row < 0)
            std::memset(of + to_row * m.width, 0, sizeof(float) * m.width);
        else
            std::memmove(of + to_row * m.width, of + row * m.width, sizeof(float) * m.width);
    }

    static void move_row(Panels from, int64_t row, Panels to, int64_t to_row, int64_t columns) {
        for (int64_t panel = 0; panel < columns / SIDE; ++panel)
            _mm512_storeu_si512(to.block(panel, to_row),
                                row < 0 ? _mm512_setzero_si512() : _mm512_loadu_si512(from.block(panel, row)));
    }

    // -- layers

    // Zeros for tokens that are in no row, of which attention says nothing.
    void clear_outside(Panels of, int64_t columns) const {
        for (int64_t token = 0; token < n; ++token)
            for (int64_t panel = 0; turn_of[token] < 0 && panel < columns / SIDE; ++panel)
                _mm512_storeu_si512(of.block(panel, token), _mm512_setzero_si512());
    }

    void forward_layer(int64_t layer) {
        Saved &s = saved[layer];
        by_chunks(0, n, [&](int64_t first, int64_t, int64_t tokens) {
            const Panels normed = s.normed.from(first);
            normalise(m, x + first * m.width, nullptr, normed, s.inverse + first, tokens);
            self().forward(4 * layer, normed, first, tokens, one_by_one, into(s.qkv.from(first)));
            turn(m, s.qkv.from(first), m.layer[layer].bias, turn_of.data() + first, tokens);
        });
        clear_outside(s.attention, mixed);
        for (int64_t row = 0; row < work.rows; ++row) {
            const int64_t start = work.row_start[row];
            attention->forward(s.qkv.from(start), s.attention.from(start), s.softmax.from(start), work.row_length[row]);
        }
        const int64_t o = 4 * layer + 1;
        if (is_late(o)) leave_others(s.attention);
        by_chunks(0, tokens_of(o), [&](int64_t first, int64_t, int64_t tokens) {
            const Panels normed = s.feed_normed.from(first);
            self().forward(o, given_to(o).from(first), first, tokens, one_by_one, onto_x(first));
            normalise(m, x + first * m.width, nullptr, normed, s.feed_inverse + first, tokens);
            feed(layer, normed, s.gate_up.from(first), first, tokens);
            self().forward(4 * layer + 3, product, first, tokens, one_by_one, onto_x(first));
        });
    }

    // What is given to site `o`.
    Panels given_to(int64_t o) const { return is_late(o) ? attended : saved[o / 4].attention; }

    // grad, and `out`, the same in bf16: the gradient of the layer's output becomes that of its input.
    void backward_layer(int64_t layer) {
        const int64_t qkv = 4 * layer, o = qkv + 1, gate_up = qkv + 2, down = qkv + 3;
        Saved &s = saved[layer];
        by_spans(
            o,
            [&](int64_t first, int64_t at, int64_t tokens) {
                const Panels normed = s.feed_normed.from(first);
                self().backward(down, out.from(first), product.from(at), first, tokens,
                                into_gate(s.gate_up.from(first), at));
                self().backward(gate_up, grad_wide.from(at), normed, first, tokens, into(grad_normed));
                leave_norm(grad_normed, normed, s.feed_inverse, first, tokens, between);
                self().backward(o, between.from(first), given_to(o).from(first), first, tokens,
                                into(grad_mixed.from(first)));
            },
            [&](int64_t first, int64_t tokens) {
                self().learn(down, out.from(first), product, tokens);
                self().learn(gate_up, grad_wide, s.feed_normed.from(first), tokens);
                self().learn(o, between.from(first), given_to(o).from(first), tokens);
            });
        if (is_late(o)) join_others();
        const Panels grad_qkv = s.grad_qkv;
        clear_outside(grad_qkv, wide);
        for (int64_t row = 0; row < work.rows; ++row) {
            const int64_t start = work.row_start[row];
            attention->backward(s.qkv.from(start), s.attention.from(start), grad_mixed.from(start), s.softmax.from(start),
                                work.row_length[row], grad_qkv.from(start));
        }
        by_spans(
            qkv,
            [&](int64_t first, int64_t, int64_t tokens) {
                const Panels normed = s.normed.from(first);
                self().backward(qkv, grad_qkv.from(first), normed, first, tokens, into(grad_normed));
                leave_norm(grad_normed, normed, s.inverse, first, tokens, out);
            },
            [&](int64_t first, int64_t tokens) {
                self().learn(qkv, grad_qkv.from(first), s.normed.from(first), tokens);
            });
    }

    // -- the head

    // x of late tokens after the last norm, but for its gain.
    void finish() {
        for (int64_t at = 0; at < late; ++at) {
            float *row = x + at * m.width;
            __m512 squares = _mm512_setzero_ps();
            for (int64_t j = 0; j < m.width; j += 16) {
                const __m512 value = _mm512_loadu_ps(row + j);
                squares = _mm512_fmadd_ps(value, value, squares);
            }
            inverse[at] = root_of_inverse(sum(squares) / static_cast<float>(m.width) + m.epsilon);
            for (int64_t j = 0; j < m.width; ++j) row[j] *= inverse[at];
        }
    }

    // grad of late tokens in bf16.
    void round_grad() {
        for (int64_t i = 0; i < late; ++i)
            for (int64_t j = 0; j < m.width; j += 16)
                store_16(out.block(j / SIDE, i) + j % SIDE, _mm512_loadu_ps(grad + i * m.width + j));
    }

    void run() {
        const Products multiplying;
        self().embed();
        for (int64_t layer = 0; layer < m.layers; ++layer) forward_layer(layer);
        finish();
        std::memset(grad, 0, sizeof(float) * late * m.width);
        self().score();
        round_grad();
        for (int64_t layer = m.layers; layer-- > 0;) backward_layer(layer);
        self().embed_backward();
    }
};

}  // namespace

// Causal attention of one row after another in fp32, and its gradient. For panels.cpp.
//
// Scores are computed for a group of queries and the keys that they see, forth and again on the way back: nothing is kept
// of a row but what its softmaxes were added up to, and no square of it is ever in memory. What comes of a row depends on
// nothing beside it.
//
// Legend: N = tokens, H, K = query and key/value heads, d = head width, W = (H + 2K) d, T = tokens of a row, rounded up to
// whole groups.

#pragma once

#include "../decoder/panels.h"

extern "C" {

struct Causal {
    int64_t rows, tokens;           // tokens: N
    const int64_t *start, *length;  // [rows]
    const int64_t *asking;          // [rows]: queries before this one are of no use to anybody; null: all are
    int64_t heads, kv_heads, width;
    const float *cos, *sin;         // [positions, d / 2]
    const float *q_norm, *k_norm;   // [d], gains of norms before that; or null
    float epsilon;                  // of those
    const float *qkv;               // [N, W], without positions
    float *out;                     // [N, H d]; written for tokens that ask, as `grad_qkv` is; the way back reads it
    float *log_total;               // [H, N], logarithms of what softmaxes were added up to; the way back reads it
    const float *grad_out;          // [N, H d]
    float *grad_qkv;                // [N, W]
};

}  // extern "C"

namespace {

constexpr int64_t QUERIES = 3 * WIDE;  // of a group: whole blocks, and whole panels of keys
static_assert(QUERIES % TALL == 0);

struct CausalRows {
    const Causal &r;
    const int64_t d, deep, group, stacked;  // deep: d in whole panels
    const float scale;
    int64_t start = 0, length = 0, t = 0, asking = 0;  // of the row under way; asking: in whole groups
    float *keys, *values, *queries, *grads, *sums, *of_keys, *of_values;  // [T, deep]
    float *keys_by_panels, *values_by_panels;                             // [d, WIDE] each
    float *weights, *slopes;                                              // [QUERIES, T]
    float *normed;                                                        // [deep]

    explicit CausalRows(const Causal &rows)
        : r(rows), d(r.width), deep(whole_panels(d)), group(r.heads / r.kv_heads),
          stacked((r.heads + 2 * r.kv_heads) * d), scale(1.0f / std::sqrt(static_cast<float>(d))) {
        int64_t longest = 0;
        for (int64_t i = 0; i < r.rows; ++i) longest = r.length[i] > longest ? r.length[i] : longest;
        longest = in_groups(longest);
        static thread_local std::vector<float> memory;  // kept: new memory has to be cleared by the system
        const size_t size = longest * (9 * deep + 2 * QUERIES) + deep;
        if (memory.size() < size) memory.resize(size);
        float *at = memory.data();
        for (float **each : {&keys, &values, &queries, &grads, &sums, &of_keys, &of_values, &keys_by_panels, &values_by_panels}) {
            *each = at;
            at += longest * deep;
        }
        weights = at;
        slopes = weights + QUERIES * longest;
        normed = slopes + QUERIES * longest;
    }

    static int64_t in_groups(int64_t tokens) { return (tokens + QUERIES - 1) / QUERIES * QUERIES; }

    void take(int64_t row) {
        start = r.start[row], length = r.length[row], t = in_groups(length);
        asking = r.asking ? r.asking[row] / QUERIES * QUERIES : 0;
    }

    // -- in and out

    const float *head_of(const float *from, int64_t columns, int64_t token, int64_t head) const {
        return from + (start + token) * columns + head * d;
    }

    // A head of the row as it is, [T, deep]: zeros where there is nothing.
    void bring(const float *from, int64_t columns, int64_t head, float *to) const {
        std::memset(to, 0, sizeof(float) * t * deep);
        for (int64_t at = 0; at < length; ++at, to += deep)
            std::memcpy(to, head_of(from, columns, at, head), sizeof(float) * d);
    }

    // One of queries or keys: through the norm, where there is one, and by the angle of each place, times `factor`.
    void bring_turned(int64_t head, const float *gain, float factor, float *to) {
        const int64_t half = d / 2;
        std::memset(to, 0, sizeof(float) * t * deep);
        for (int64_t at = 0; at < length; ++at, to += deep) {
            const float *x = head_of(r.qkv, stacked, at, head), *cos = r.cos + at * half, *sin = r.sin + at * half;
            if (gain) {
                norm(x, gain, normed, static_cast<int>(d), r.epsilon);
                x = normed;
            }
            for (int64_t j = 0; j < half; ++j) {
                to[j] = (x[j] * cos[j] - x[j + half] * sin[j]) * factor;
                to[j + half] = (x[j + half] * cos[j] + x[j] * sin[j]) * factor;
            }
        }
    }

    void give(const float *from, int64_t head) const {
        for (int64_t at = 0; at < length; ++at, from += deep)
            std::memcpy(grad_of(at, head), from, sizeof(float) * d);
    }

    // The way back of `bring_turned`, for `tokens` from `first` on, which begin at `from`.
    void give_turned(const float *from, int64_t first, int64_t tokens, int64_t head, const float *gain, float factor) const {
        const int64_t half = d / 2;
        for (int64_t at = first; at < first + tokens; ++at, from += deep) {
            float *to = grad_of(at, head);
            const float *cos = r.cos + at * half, *sin = r.sin + at * half;
            for (int64_t j = 0; j < half; ++j) {
                to[j] = (from[j] * cos[j] + from[j + half] * sin[j]) * factor;
                to[j + half] = (from[j + half] * cos[j] - from[j] * sin[j]) * factor;
            }
            if (!gain) continue;
            const float *x = head_of(r.qkv, stacked, at, head);
            const float inverse = 1.0f / std::sqrt(dot(x, x, static_cast<int>(d)) / d + r.epsilon);
            float along = 0.0f;
            for (int64_t j = 0; j < d; ++j) along += (to[j] *= gain[j]) * x[j];
            const float mean = along * inverse * inverse / d;
            for (int64_t j = 0; j < d; ++j) to[j] = (to[j] - x[j] * mean) * inverse;
        }
    }

    float *grad_of(int64_t token, int64_t head) const {
        return const_cast<float *>(head_of(r.grad_qkv, stacked, token, head));
    }

    // [T, deep] by panels of WIDE rows, exchanged.
    void exchange(const float *from, float *to) const {
        for (int64_t first = 0; first < t; first += WIDE, to += d * WIDE)
            for (int64_t i = 0; i < WIDE; ++i)
                for (int64_t j = 0; j < d; ++j) to[j * WIDE + i] = from[(first + i) * deep + j];
    }

    // -- products: blocks of TALL by WIDE

    // c = rows of `a`, whose elements lie `a_row` and `a_deep` apart, times `depth` rows of `b`; or adds that. As `add_rows`,
    // with sums that come from memory and go there.
    template <bool ADD>
    __attribute__((noinline)) static void multiply(const float *a, int64_t a_row, int64_t a_deep, const float *b,
                                                   int64_t b_deep, int64_t depth, float *c, int64_t c_row) {
        Lanes now[TALL][2];
#pragma GCC unroll 12
        for (int i = 0; i < TALL; ++i)
            for (int j = 0; j < 2; ++j) now[i][j] = ADD ? read(c + i * c_row + j * LANES) : Lanes{};
        for (int64_t k = 0; k < depth; ++k, a += a_deep, b += b_deep) {
            const Lanes left = read(b), right = read(b + LANES);
            for (int i = 0; i < TALL; ++i) {
                const float x = a[i * a_row];
                now[i][0] += x * left;
                now[i][1] += x * right;
            }
        }
#pragma GCC unroll 12
        for (int i = 0; i < TALL; ++i)
            for (int j = 0; j < 2; ++j) write(c + i * c_row + j * LANES, now[i][j]);
    }

    // How many keys the block of a query sees, those included that only its later queries do.
    static int64_t seen(int64_t query) { return query / TALL * TALL + TALL; }

    // Of the queries of a group from `first` on, the products of `from` [T, deep] with all that they see of `by_panels`.
    void products(const float *from, const float *by_panels, int64_t first, int64_t real, float *to) const {
        for (int64_t q = 0; q < real; q += TALL)
            for (int64_t key = 0; key < seen(first + q); key += WIDE)
                multiply<false>(from + (first + q) * deep, deep, 1, by_panels + key * d, WIDE, d, to + q * t + key, t);
    }

    // sums = weights of the group's queries times what they see of `from` [T, deep].
    void add_up(const float *of_queries, const float *from, int64_t first, int64_t real) const {
        for (int64_t q = 0; q < real; q += TALL)
            for (int64_t j = 0; j < deep; j += WIDE)
                multiply<false>(of_queries + q * t, t, 1, from + j, deep, seen(first + q), sums + q * deep + j, deep);
    }

    // Adds to `to` [T, deep], for all keys that the group's queries see, their weights times `from` [T, deep].
    void add_to_keys(const float *of_queries, const float *from, int64_t first, int64_t real, float *to) const {
        for (int64_t key = 0; key < first + real; key += TALL) {
            const int64_t q = key > first ? key - first : 0;  // the first that sees it
            for (int64_t j = 0; j < deep; j += WIDE)
                multiply<true>(of_queries + q * t + key, 1, t, from + (first + q) * deep + j, deep, real - q,
                               to + key * deep + j, deep);
        }
    }

    // -- softmaxes

    // Zeros for what a query does not see of what its block does.
    void hide(float *row, int64_t query) const {
        for (int64_t key = query + 1; key < whole_panels(seen(query)); ++key) row[key] = 0.0f;
    }

    static float largest(const float *x, int64_t n) {
        Lanes most = Lanes{} + x[0];
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES) most = read(x + i) > most ? read(x + i) : most;
        float highest = x[0];
        for (int lane = 0; lane < LANES; ++lane) highest = most[lane] > highest ? most[lane] : highest;
        for (; i < n; ++i) highest = x[i] > highest ? x[i] : highest;
        return highest;
    }

    // e^(x - by) of n numbers, whole vectors; nothing where it is less than e^-60, for what is made of that may be too small
    // to be a normal number, which some processors take their time for.
    static void exponentials_from(float *x, float by, int64_t n) {
        for (int64_t i = 0; i < n; i += LANES) {
            const Lanes power = read(x + i) - by;
            write(x + i, power < -60.0f ? Lanes{} : exponential(power));
        }
    }

    static float total(const float *x, int64_t n) {
        Lanes sums{};
        for (int64_t i = 0; i < n; i += LANES) sums += read(x + i);
        float sum = 0.0f;
        for (int lane = 0; lane < LANES; ++lane) sum += sums[lane];
        return sum;
    }

    // -- forth and back

    void forward() {
        for (int64_t kv_head = 0; kv_head < r.kv_heads; ++kv_head) {
            bring_keys(kv_head);
            for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
                bring_turned(head, r.q_norm, scale, queries);
                for (int64_t first = asking; first < length; first += QUERIES) attend(head, first);
            }
        }
    }

    void bring_keys(int64_t kv_head) {
        bring_turned(r.heads + kv_head, r.k_norm, 1.0f, keys);
        bring(r.qkv, stacked, r.heads + r.kv_heads + kv_head, values);
        exchange(keys, keys_by_panels);
    }

    void attend(int64_t head, int64_t first) {
        const int64_t real = length - first < QUERIES ? length - first : QUERIES;
        float over[QUERIES];
        products(queries, keys_by_panels, first, real, weights);
        for (int64_t q = 0; q < real; ++q) {
            float *row = weights + q * t;
            const int64_t query = first + q, wide = whole_panels(seen(query));
            const float highest = largest(row, query + 1);
            exponentials_from(row, highest, wide);
            hide(row, query);
            const float sum = total(row, wide);
            over[q] = 1.0f / sum;
            r.log_total[head * r.tokens + start + query] = highest + std::log(sum);
        }
        add_up(weights, values, first, real);
        for (int64_t q = 0; q < real; ++q) {
            float *to = const_cast<float *>(head_of(r.out, r.heads * d, first + q, head));
            for (int64_t j = 0; j < d; ++j) to[j] = sums[q * deep + j] * over[q];
        }
    }

    void backward() {
        for (int64_t kv_head = 0; kv_head < r.kv_heads; ++kv_head) {
            bring_keys(kv_head);
            exchange(values, values_by_panels);
            std::memset(of_keys, 0, sizeof(float) * t * deep);
            std::memset(of_values, 0, sizeof(float) * t * deep);
            for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
                bring_turned(head, r.q_norm, scale, queries);
                bring(r.grad_out, r.heads * d, head, grads);
                for (int64_t first = asking; first < length; first += QUERIES) attend_back(head, first);
            }
            give_turned(of_keys, 0, length, r.heads + kv_head, r.k_norm, 1.0f);
            give(of_values, r.heads + r.kv_heads + kv_head);
        }
    }

    void attend_back(int64_t head, int64_t first) {
        const int64_t real = length - first < QUERIES ? length - first : QUERIES;
        products(queries, keys_by_panels, first, real, weights);
        products(grads, values_by_panels, first, real, slopes);
        for (int64_t q = 0; q < real; ++q) {
            float *row = weights + q * t, *slope = slopes + q * t;
            const int64_t query = first + q, wide = whole_panels(seen(query));
            // How far the query's output goes along its gradient: what the softmax takes from that of each weight.
            const float drift = dot(grads + query * deep, head_of(r.out, r.heads * d, query, head), d);
            exponentials_from(row, r.log_total[head * r.tokens + start + query], wide);
            hide(row, query);
            for (int64_t key = 0; key < wide; key += LANES)
                write(slope + key, read(row + key) * (read(slope + key) - drift));
        }
        add_up(slopes, keys, first, real);
        give_turned(sums, first, real, head, r.q_norm, scale);
        add_to_keys(slopes, queries, first, real, of_keys);
        add_to_keys(weights, grads, first, real, of_values);
    }
};

}  // namespace

extern "C" {

void tunesmith_attend_rows(const Causal *rows) {
    CausalRows work(*rows);
    for (int64_t row = 0; row < rows->rows; ++row) {
        work.take(row);
        if (work.asking < work.length) work.forward();
    }
}

// The gradient of `qkv`, from that of `out` and what `tunesmith_attend_rows` left.
void tunesmith_attend_rows_back(const Causal *rows) {
    CausalRows work(*rows);
    for (int64_t row = 0; row < rows->rows; ++row) {
        work.take(row);
        if (work.asking < work.length) work.backward();
    }
}

}  // extern "C"

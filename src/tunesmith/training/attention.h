// Causal attention of one row after another, and its gradient, in blocks of 32 keys and 32 queries that stay in the cache:
// no square of a row is ever in memory. For layers.h.
//
// Scores lie with a key to a row and a query to a column: the weights over the keys of a query, and their sum, are found for
// 16 queries at once, and they are operands of products as they come.
//
// Legend: as in step.cpp.

#pragma once

#include "../decoder/packed.h"

namespace {

// What the softmax of each query was: the score that weights were counted from, and one over their sum.
struct Softmax {
    float *reference, *over;  // [H, N], a head `stride` behind the one before
    int64_t stride;

    Softmax from(int64_t token) const { return {reference + token, over + token, stride}; }
    Softmax of_head(int64_t head) const { return from(head * stride); }
};

struct Attention {
    static constexpr float BEYOND = 1e26f;  // a sum of weights that is close to the end of numbers

    const Model &m;
    const int64_t head_panels, group;
    bf16 *turned, *queries_by_column, *outs_by_column, *queries_by_row, *outs_by_row, *weights, *grad_weights;
    float *scores, *grad_q, *grad_k, *grad_v, *drift;
    alignas(64) float c[BLOCK];

    // For rows of up to `longest` tokens.
    Attention(const Model &model, int64_t longest, Arena &arena)
        : m(model), head_panels(m.head_width / SIDE), group(m.heads / m.kv_heads) {
        const int64_t row = rounded_up(longest), d = m.head_width;
        for (bf16 **each : {&turned, &queries_by_column, &outs_by_column, &queries_by_row, &outs_by_row})
            *each = arena.take<bf16>(row * d);
        for (bf16 **each : {&weights, &grad_weights}) *each = arena.take<bf16>(SIDE * row);
        for (float **each : {&grad_q, &grad_k, &grad_v}) *each = arena.take<float>(row * d);
        scores = arena.take<float>(SIDE * row);
        drift = arena.take<float>(row);
    }

    // The way back, from sums [d / 32][T, 32] of one head of a row to its panels; `factor` is that of `turn`.
    void turn_back(const float *from, int64_t stride, Panels to, int64_t tokens, float factor) const {
        const int64_t half = m.head_width / 2;
        const __m512 scale = _mm512_set1_ps(factor);
        for (int64_t j = 0; j < half; j += 16) {
            const int64_t k = half + j;
            for (int64_t at = 0; at < tokens; ++at) {
                const __m512 a = _mm512_loadu_ps(from + j / SIDE * stride + at * SIDE + j % SIDE);
                const __m512 b = _mm512_loadu_ps(from + k / SIDE * stride + at * SIDE + k % SIDE);
                const __m512 cos = _mm512_mul_ps(_mm512_loadu_ps(m.cos + at * half + j), scale);
                const __m512 sin = _mm512_mul_ps(_mm512_loadu_ps(m.sin + at * half + j), scale);
                store_16(to.block(j / SIDE, at) + j % SIDE, _mm512_fmadd_ps(a, cos, _mm512_mul_ps(b, sin)));
                store_16(to.block(k / SIDE, at) + k % SIDE, _mm512_fmsub_ps(b, cos, _mm512_mul_ps(a, sin)));
            }
        }
    }

    // One head of a row [T, d] packed, its columns as depth: d -> T, block of T by block ...
    void pack_by_columns(Panels from, int64_t t, bf16 *to) const {
        for (int64_t at = 0; at < t; at += SIDE)
            for (int64_t j = 0; j < head_panels; ++j, to += BLOCK) pack_columns(from.block(j, at), t - at, to);
    }

    // ... its rows: T -> d ...
    void pack_by_rows(Panels from, int64_t t, bf16 *to) const {
        for (int64_t j = 0; j < head_panels; ++j)
            for (int64_t at = 0; at < t; at += SIDE, to += BLOCK) pack_rows(from.block(j, at), t - at, to);
    }

    // ... or with rows and columns exchanged, as what is multiplied from the left.
    void exchange(Panels from, int64_t t, bf16 *to) const {
        for (int64_t j = 0; j < head_panels; ++j)
            for (int64_t at = 0; at < t; at += SIDE, to += BLOCK) {
                pack_rows(from.block(j, at), t - at, to);
                settle_pairs(to);
                settle_pairs(to + BLOCK / 2);
            }
    }

    // Pairs of rows, 16 columns wide, as 16 rows of 32.
    static void settle_pairs(bf16 *at) {
        __m512i words[16];
        for (int64_t i = 0; i < 16; ++i) words[i] = _mm512_loadu_si512(at + i * SIDE);
        transpose(words);
        for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(at + i * SIDE, words[i]);
    }

    // What the tokens of a row of length t attend to, [T, H d], from their turned qkv [T, W].
    void forward(Panels qkv, Panels out, Softmax softmax, int64_t t) {
        const int64_t blocks = rounded_up(t) / SIDE;
        for (int64_t key_head = 0; key_head < m.kv_heads; ++key_head) {
            const Panels k = qkv.panels((m.heads + key_head) * head_panels);
            exchange(k.panels(m.kv_heads * head_panels), t, turned);
            for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
                const Panels q = qkv.panels(head * head_panels), to = out.panels(head * head_panels);
                const Softmax of_head = softmax.of_head(head);
                for (int64_t block = 0; block < blocks; ++block) {
                    const int64_t first = block * SIDE, real = t - first < SIDE ? t - first : SIDE;
                    const bool wide = real > SIDE / 2;
                    for (int64_t j = 0; j < head_panels; ++j)
                        pack_columns(q.block(j, first), real, queries_by_column + j * BLOCK);
                    for (int64_t at = 0; at <= block; ++at) {
                        clear();
                        accumulate_part(wide || at < block, wide, k.block(0, at * SIDE), k.step(), queries_by_column,
                                        head_panels);
                        take_sums(scores + at * BLOCK);
                    }
                    __m512 over[2];
                    if (wide)
                        weigh_queries<2>(block, real, of_head.from(first), over);
                    else
                        weigh_queries<1>(block, real, of_head.from(first), over);
                    for (int64_t j = 0; j < head_panels; ++j) {
                        clear();
                        accumulate_part(true, wide, turned + j * blocks * BLOCK, BLOCK, weights, block + 1);
                        take_sums(c);
                        for (int64_t half = 0; half <= wide; ++half)
                            give_out(half, over[half], to.block(j, first), real);
                    }
                }
            }
        }
    }

    // The weights of the queries of a block, 16 to a half, but for the factors `over`, from scores of its and all earlier
    // keys. They are counted from the score of each query's own key: the largest takes its place only where it is so far
    // above that this overflows.
    template <int HALVES>
    void weigh_queries(int64_t block, int64_t real, Softmax softmax, __m512 over[HALVES]) {
        const __m512i own = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                               _mm512_set1_epi32(SIDE + 1));
        __m512 from[HALVES];
        for (int half = 0; half < HALVES; ++half)
            from[half] = _mm512_i32gather_ps(own, scores + block * BLOCK + half * (SIDE + 1) * SIDE / 2, sizeof(float));
        weigh_from<HALVES>(block, real, from, over);
        bool again = false;
        for (int half = 0; half < HALVES; ++half) {
            const __mmask16 there = first_of_16(real - half * SIDE / 2);
            const __mmask16 beyond = _mm512_mask_cmp_ps_mask(there, over[half], _mm512_set1_ps(BEYOND), _CMP_GT_OQ);
            if (!beyond) continue;
            from[half] = _mm512_mask_mov_ps(from[half], beyond, largest_of(half, block, real));
            again = true;
        }
        if (again) weigh_from<HALVES>(block, real, from, over);
        for (int half = 0; half < HALVES; ++half) {
            const __mmask16 there = first_of_16(real - half * SIDE / 2);
            over[half] = _mm512_div_ps(_mm512_set1_ps(1.0f), over[half]);
            _mm512_mask_storeu_ps(softmax.reference + half * SIDE / 2, there, from[half]);
            _mm512_mask_storeu_ps(softmax.over + half * SIDE / 2, there, over[half]);
        }
    }

    // The weights, counted from the given scores; their sums come into `total`.
    template <int HALVES>
    void weigh_from(int64_t block, int64_t real, const __m512 from[HALVES], __m512 total[HALVES]) {
        const int64_t diagonal = block * SIDE, keys = diagonal + real;
        for (int half = 0; half < HALVES; ++half) total[half] = _mm512_setzero_ps();
        for (int64_t key = 0; key < diagonal + SIDE; key += 2)
            for (int half = 0; half < HALVES; ++half) {
                __m512 pair[2] = {};
                for (int64_t i = 0; i < 2 && key + i < keys; ++i) {
                    const __mmask16 seen = key < diagonal ? 0xffff : seen_by(half, key + i - diagonal);
                    const float *score = scores + (key + i) * SIDE + half * SIDE / 2;
                    pair[i] = _mm512_maskz_mov_ps(seen, exponential(_mm512_sub_ps(_mm512_load_ps(score), from[half])));
                }
                total[half] = _mm512_add_ps(total[half], _mm512_add_ps(pair[0], pair[1]));
                bf16 *to = weights + half * BLOCK / 2 + key / SIDE * BLOCK + key % SIDE / 2 * SIDE;
                _mm512_storeu_si512(to, in_pairs(pair[0], pair[1]));
            }
    }

    // The largest score of each of 16 queries.
    __m512 largest_of(int64_t half, int64_t block, int64_t real) const {
        __m512 most = _mm512_set1_ps(-__builtin_huge_valf());
        for (int64_t key = 0; key < block * SIDE + real; ++key) {
            const __mmask16 seen = key < block * SIDE ? 0xffff : seen_by(half, key - block * SIDE);
            most = _mm512_mask_max_ps(most, seen, most, _mm512_load_ps(scores + key * SIDE + half * SIDE / 2));
        }
        return most;
    }

    // Which of 16 queries see a key, the places of both counted from the same.
    static __mmask16 seen_by(int64_t half, int64_t key) {
        return static_cast<__mmask16>(~first_of_16(key - half * SIDE / 2));
    }

    // Two rows of 16 as pairs.
    static __m512i in_pairs(__m512 first, __m512 second) {
        alignas(64) static constexpr uint16_t PAIRS[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                           8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        return _mm512_permutexvar_epi16(_mm512_load_si512(PAIRS), both(first, second));
    }

    // Sums of 16 queries, a query to a column, times their factors to their rows.
    void give_out(int64_t half, __m512 factor, bf16 *to, int64_t real) {
        __m512i low[16], high[16];
        for (int64_t i = 0; i < 16; ++i) {
            const float *row = c + i * SIDE + half * SIDE / 2;
            low[i] = _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(row), factor));
            high[i] = _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(row + BLOCK / 2), factor));
        }
        transpose(low);
        transpose(high);
        to += half * BLOCK / 2;
        for (int64_t i = 0; i < 16 && i < real - half * SIDE / 2; ++i)
            store_32(to + i * SIDE, _mm512_castsi512_ps(low[i]), _mm512_castsi512_ps(high[i]));
    }

    // The gradient of qkv before it was turned, from that of `out`.
    void backward(Panels qkv, Panels out, Panels grad_out, Softmax softmax, int64_t t, Panels grad_qkv) {
        const int64_t blocks = rounded_up(t) / SIDE, head_size = head_panels * BLOCK, row_size = blocks * BLOCK;
        const float scale = root_of_inverse(static_cast<float>(m.head_width));
        for (int64_t key_head = 0; key_head < m.kv_heads; ++key_head) {
            const int64_t key_panel = (m.heads + key_head) * head_panels;
            const Panels k = qkv.panels(key_panel), v = k.panels(m.kv_heads * head_panels);
            exchange(k, t, turned);
            std::memset(grad_k, 0, sizeof(float) * head_panels * row_size);
            std::memset(grad_v, 0, sizeof(float) * head_panels * row_size);
            for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
                const Panels q = qkv.panels(head * head_panels), go = grad_out.panels(head * head_panels);
                pack_by_columns(q, t, queries_by_column);
                pack_by_columns(go, t, outs_by_column);
                pack_by_rows(q, t, queries_by_row);
                pack_by_rows(go, t, outs_by_row);
                std::memset(grad_q, 0, sizeof(float) * head_panels * row_size);
                find_drift(go, out.panels(head * head_panels), t);
                for (int64_t at = 0; at < blocks; ++at) {  // of keys
                    const int64_t keys = t - at * SIDE < SIDE ? t - at * SIDE : SIDE;
                    const bool deep = keys > SIDE / 2;
                    for (int64_t block = at; block < blocks; ++block) {  // of queries
                        const bool wide = t - block * SIDE > SIDE / 2;
                        alignas(64) float score[BLOCK];
                        alignas(64) bf16 in_pairs[BLOCK];
                        clear();
                        accumulate_part(deep, wide, k.block(0, at * SIDE), k.step(), queries_by_column + block * head_size,
                                        head_panels);
                        take_sums(score);
                        clear();
                        accumulate_part(deep, wide, v.block(0, at * SIDE), v.step(), outs_by_column + block * head_size,
                                        head_panels);
                        take_sums(c);
                        if (at < block)  // every query sees every key
                            weigh_back<true>(score, at, block, t, softmax.of_head(head), in_pairs);
                        else
                            weigh_back<false>(score, at, block, t, softmax.of_head(head), in_pairs);
                        for (int64_t j = 0; j < head_panels; ++j) {
                            float *to = grad_q + j * row_size + block * BLOCK;
                            give_sums(to);
                            accumulate_part(true, wide, turned + (j * blocks + at) * BLOCK, 0, in_pairs, 1);
                            take_sums(to);
                        }
                    }
                    for (int64_t j = 0; j < head_panels; ++j) {
                        const int64_t place = j * row_size + at * BLOCK;
                        give_sums(grad_v + place);
                        accumulate_part(deep, true, weights + at * BLOCK, BLOCK, outs_by_row + place, blocks - at);
                        take_sums(grad_v + place);
                        give_sums(grad_k + place);
                        accumulate_part(deep, true, grad_weights + at * BLOCK, BLOCK, queries_by_row + place, blocks - at);
                        take_sums(grad_k + place);
                    }
                }
                for (int64_t block = 0; block < head_panels * blocks; ++block) exchange_sums(grad_q + block * BLOCK);
                turn_back(grad_q, row_size, grad_qkv.panels(head * head_panels), t, scale);
            }
            const Panels of_k = grad_qkv.panels(key_panel), of_v = of_k.panels(m.kv_heads * head_panels);
            turn_back(grad_k, row_size, of_k, t, 1.0f);
            for (int64_t j = 0; j < head_panels; ++j)
                for (int64_t i = 0; i < t; ++i) {
                    const float *from = grad_v + j * row_size + i * SIDE;
                    store_32(of_v.block(j, i), _mm512_loadu_ps(from), _mm512_loadu_ps(from + 16));
                }
        }
    }

    // How far each query's output goes along its gradient: what the softmax takes from that of each weight.
    void find_drift(Panels go, Panels o, int64_t t) {
        for (int64_t i = 0; i < t; ++i) {
            __m512 along = _mm512_setzero_ps();
            for (int64_t j = 0; j < head_panels; ++j)
                along = _mm512_dpbf16_ps(along, load_32(go.block(j, i)), load_32(o.block(j, i)));
            drift[i] = sum(along);
        }
    }

    // From scores, and the gradients of weights in c: weights and gradients of scores, the latter also as pairs of rows.
    // Keys beyond the row get zeros; so do queries, whose gradient is nothing. SEEN: every query sees every key.
    template <bool SEEN>
    void weigh_back(const float *score, int64_t at, int64_t block, int64_t t, Softmax softmax, bf16 *pairs) {
        const int64_t first = block * SIDE, keys = t - at * SIDE;
        __m512 reference[2], over[2], drifts[2];
        for (int64_t half = 0; half < 2; ++half) {
            const int64_t query = first + half * SIDE / 2;
            const __mmask16 there = first_of_16(t - query);
            reference[half] = _mm512_maskz_loadu_ps(there, softmax.reference + query);
            over[half] = _mm512_maskz_loadu_ps(there, softmax.over + query);
            drifts[half] = _mm512_maskz_loadu_ps(there, drift + query);
        }
        bf16 *weight = weights + block * BLOCK, *grad = grad_weights + block * BLOCK;
        for (int64_t key = 0; key < SIDE; key += 2) {
            __m512i rows[2] = {};
            for (int64_t i = 0; i < 2; ++i) {
                const int64_t place = (key + i) * SIDE;
                __m512 value[2] = {}, slope[2] = {};
                for (int64_t half = 0; half < 2 && (SEEN || key + i < keys); ++half) {
                    const __mmask16 seen = SEEN || at < block ? 0xffff : seen_by(half, key + i);
                    const __m512 above = _mm512_sub_ps(_mm512_load_ps(score + place + 16 * half), reference[half]);
                    value[half] = _mm512_maskz_mul_ps(seen, exponential(above), over[half]);
                    slope[half] = _mm512_mul_ps(
                        value[half], _mm512_sub_ps(_mm512_load_ps(c + place + 16 * half), drifts[half]));
                }
                _mm512_storeu_si512(weight + place, both(value[0], value[1]));
                rows[i] = both(slope[0], slope[1]);
                _mm512_storeu_si512(grad + place, rows[i]);
            }
            interleave(rows[0], rows[1], pairs + key / 2 * SIDE, pairs + BLOCK / 2 + key / 2 * SIDE);
        }
    }

    // A block of sums, rows and columns exchanged.
    static void exchange_sums(float *block) {
        __m512i quarters[4][16];
        for (int64_t i = 0; i < 4; ++i) turned_quarter(block, i / 2 * 16, i % 2 * 16, quarters[i]);
        for (int64_t i = 0; i < 4; ++i)
            for (int64_t j = 0; j < 16; ++j)
                _mm512_store_si512(block + (i % 2 * 16 + j) * SIDE + i / 2 * 16, quarters[i][j]);
    }
};

}  // namespace

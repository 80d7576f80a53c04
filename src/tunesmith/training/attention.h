// Causal attention of one row after another, and its gradient, in blocks of 32 queries and 32 keys that stay in the cache:
// no square of a row is ever in memory. For step.cpp.
//
// Legend: as in step.cpp.

#pragma once

#include "../decoder/packed.h"

namespace {

struct Attention {
    const Model &m;
    const int64_t head_panels, group;
    bf16 *keys_by_column, *values_by_column, *by_row, *queries_by_row, *outs_by_row, *weights, *grad_weights;
    float *scores, *grad_q, *grad_k, *grad_v, *drift;
    alignas(64) float c[BLOCK];

    // For rows of up to `longest` tokens.
    Attention(const Model &model, int64_t longest, Arena &arena)
        : m(model), head_panels(m.head_width / SIDE), group(m.heads / m.kv_heads) {
        const int64_t row = rounded_up(longest), d = m.head_width;
        for (bf16 **each : {&keys_by_column, &values_by_column, &by_row, &queries_by_row, &outs_by_row})
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

    // One head of a row [T, d] packed, its columns as depth: d -> T ...
    void pack_by_columns(Panels from, int64_t t, bf16 *to) const {
        for (int64_t at = 0; at < t; at += SIDE)
            for (int64_t j = 0; j < head_panels; ++j, to += BLOCK) pack_columns(from.block(j, at), t - at, to);
    }

    // ... or its rows: T -> d.
    void pack_by_rows(Panels from, int64_t t, bf16 *to) const {
        for (int64_t j = 0; j < head_panels; ++j)
            for (int64_t at = 0; at < t; at += SIDE, to += BLOCK) pack_rows(from.block(j, at), t - at, to);
    }

    // What the tokens of a row of length t attend to, [T, H d], from their turned qkv [T, W]. Leaves the logarithms of the
    // softmaxes' sums in `log_sum`, those of a head `stride` behind those of the head before.
    void forward(Panels qkv, Panels out, float *log_sum, int64_t stride, int64_t t) {
        const int64_t blocks = rounded_up(t) / SIDE, key_size = head_panels * BLOCK;
        for (int64_t key_head = 0; key_head < m.kv_heads; ++key_head) {
            const Panels k = qkv.panels((m.heads + key_head) * head_panels);
            pack_by_columns(k, t, keys_by_column);
            pack_by_rows(k.panels(m.kv_heads * head_panels), t, by_row);
            for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
                const Panels q = qkv.panels(head * head_panels);
                const Panels to = out.panels(head * head_panels);
                for (int64_t block = 0; block < blocks; ++block) {
                    const int64_t first = block * SIDE, real = t - first < SIDE ? t - first : SIDE;
                    float factor[SIDE];
                    for (int64_t at = 0; at <= block; ++at) {
                        clear();
                        accumulate(q.block(0, first), q.step(), keys_by_column + at * key_size, head_panels);
                        take_sums(scores + at * BLOCK);
                    }
                    for (int64_t i = 0; i < real; ++i)
                        factor[i] = weigh(scores + i * SIDE, weights + i * SIDE, first + i + 1,
                                          log_sum + head * stride + first + i);
                    for (int64_t j = 0; j < head_panels; ++j) {
                        clear();
                        accumulate(weights, BLOCK, by_row + j * blocks * BLOCK, block + 1);
                        take_sums(c);
                        bf16 *at = to.block(j, first);
                        for (int64_t i = 0; i < real; ++i) {
                            const __m512 f = _mm512_set1_ps(factor[i]);
                            store_32(at + i * SIDE, _mm512_mul_ps(_mm512_load_ps(c + i * SIDE), f),
                                     _mm512_mul_ps(_mm512_load_ps(c + i * SIDE + 16), f));
                        }
                    }
                }
            }
        }
    }

    // The gradient of qkv before it was turned, from that of `out`.
    void backward(Panels qkv, Panels out, Panels grad_out, const float *log_sum, int64_t stride, int64_t t,
                  Panels grad_qkv) {
        const int64_t blocks = rounded_up(t) / SIDE, key_size = head_panels * BLOCK, row_size = blocks * BLOCK;
        const float scale = root_of_inverse(static_cast<float>(m.head_width));
        for (int64_t key_head = 0; key_head < m.kv_heads; ++key_head) {
            const int64_t key_panel = (m.heads + key_head) * head_panels;
            const Panels k = qkv.panels(key_panel), v = k.panels(m.kv_heads * head_panels);
            pack_by_columns(k, t, keys_by_column);
            pack_by_columns(v, t, values_by_column);
            pack_by_rows(k, t, by_row);
            std::memset(grad_k, 0, sizeof(float) * head_panels * row_size);
            std::memset(grad_v, 0, sizeof(float) * head_panels * row_size);
            for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
                const Panels q = qkv.panels(head * head_panels);
                const Panels go = grad_out.panels(head * head_panels);
                const float *sums = log_sum + head * stride;
                pack_by_rows(q, t, queries_by_row);
                pack_by_rows(go, t, outs_by_row);
                std::memset(grad_q, 0, sizeof(float) * head_panels * row_size);
                find_drift(go, out.panels(head * head_panels), t);
                for (int64_t at = 0; at < blocks; ++at) {                 // of keys
                    for (int64_t block = at; block < blocks; ++block) {  // of queries
                        alignas(64) float weight[BLOCK];
                        alignas(64) bf16 grad_score[BLOCK];
                        clear();
                        accumulate(q.block(0, block * SIDE), q.step(), keys_by_column + at * key_size, head_panels);
                        take_sums(weight);
                        clear();
                        accumulate(go.block(0, block * SIDE), go.step(), values_by_column + at * key_size, head_panels);
                        take_sums(c);
                        for (int64_t i = 0; i < SIDE; ++i) {
                            const int64_t query = block * SIDE + i;
                            weigh_back(weight + i * SIDE, c + i * SIDE, query < t ? query + 1 - at * SIDE : 0,
                                       query < t ? sums[query] : 0.0f, query < t ? drift[query] : 0.0f);
                        }
                        round_turned(weight, weights + block * BLOCK);
                        round_turned(c, grad_weights + block * BLOCK);
                        round_block(c, grad_score);
                        for (int64_t j = 0; j < head_panels; ++j) {
                            float *to = grad_q + j * row_size + block * BLOCK;
                            give_sums(to);
                            accumulate(grad_score, 0, by_row + (j * blocks + at) * BLOCK, 1);
                            take_sums(to);
                        }
                    }
                    for (int64_t j = 0; j < head_panels; ++j) {
                        const int64_t place = j * row_size + at * BLOCK;
                        give_sums(grad_v + place);
                        accumulate(weights + at * BLOCK, BLOCK, outs_by_row + place, blocks - at);
                        take_sums(grad_v + place);
                        give_sums(grad_k + place);
                        accumulate(grad_weights + at * BLOCK, BLOCK, queries_by_row + place, blocks - at);
                        take_sums(grad_k + place);
                    }
                }
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
            for (int64_t j = 0; j < head_panels; ++j) {
                const bf16 *g = go.block(j, i), *value = o.block(j, i);
                along = _mm512_fmadd_ps(load_low(g), load_low(value), along);
                along = _mm512_fmadd_ps(load_low(g + 16), load_low(value + 16), along);
            }
            drift[i] = sum(along);
        }
    }

    // Scores of one query become weights, and the gradients of the weights those of the scores.
    static void weigh_back(float *score, float *grad, int64_t seen, float log_sum, float drift) {
        for (int64_t half = 0; half < SIDE; half += 16) {
            const __mmask16 there = first_of_16(seen - half);
            const __m512 at = _mm512_sub_ps(_mm512_load_ps(score + half), _mm512_set1_ps(log_sum));
            const __m512 weight = _mm512_maskz_mov_ps(there, exponential(at));
            const __m512 above = _mm512_sub_ps(_mm512_load_ps(grad + half), _mm512_set1_ps(drift));
            _mm512_store_ps(score + half, weight);
            _mm512_store_ps(grad + half, _mm512_maskz_mul_ps(there, weight, above));
        }
    }
};

}  // namespace

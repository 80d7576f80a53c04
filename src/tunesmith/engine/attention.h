// Attention in fp32 over the paged cache, and the angles of queries and keys before it: for any tokens of any sequences,
// many of one or one of many, to the same bits.
//
// Legend: N = tokens, H, K = query and key/value heads, G = H / K, d = head width, P = positions of a block of the cache.

#pragma once

#include <vector>

#include "../decoder/lanes.h"

extern "C" {

struct Span {
    int64_t first, tokens, position;  // of its tokens in the step; how many; where the first stands in its sequence
    int64_t wanted, into;             // of the last of them, how many attend; where the first of these goes in `mixed`
    const int32_t *blocks;            // of its sequence
};

struct Attention {
    int32_t heads, kv_heads, head_width;
    float epsilon;
    const float *q_norm, *k_norm;  // [d], or null
    const float *cosines, *sines;  // [positions, d / 2]
    int64_t spans;
    const Span *span;
    float *qkv;    // [N, (H + 2 K) d]; queries and keys are turned in place
    float *keys;   // [block K + head, d, P]
    float *values; // [block K + head, P, d]
    float *mixed;  // out: [tokens that attend, H d]
};

}  // extern "C"

namespace {

constexpr int POSITIONS = 32;               // of a block of the cache
constexpr int VECTORS = POSITIONS / LANES;  // of its positions
constexpr int QUERIES = 6;                  // at once
constexpr int LINE = 64 / sizeof(float);    // of the caches

// Vectors of sums for each of N queries: enough sums under way not to wait for one another, and few enough for registers.
template <int N>
constexpr int SUMS = N > 3 || VECTORS < 4 ? 2 : 4;

// Attention of one head of keys and values in one span.
struct Head {
    const Attention &a;
    const Span &span;
    const int head, d, group;
    const int64_t wide;
    std::vector<float> &scores;  // room, [QUERIES, positions]

    Head(const Attention &all, const Span &of, int index, std::vector<float> &room)
        : a(all), span(of), head(index), d(all.head_width), group(all.heads / all.kv_heads),
          wide(int64_t(all.heads + 2 * all.kv_heads) * all.head_width), scores(room) {}

    int64_t start(int64_t block) const { return (int64_t(span.blocks[block]) * a.kv_heads + head) * POSITIONS * d; }

    int64_t unwanted() const { return span.tokens - span.wanted; }

    // Row t G + i: query i of token t.
    float *query(int64_t row) const { return a.qkv + (span.first + row / group) * wide + (head * group + row % group) * d; }
    float *out(int64_t row) const {
        return a.mixed + ((span.into + row / group - unwanted()) * a.heads + head * group + row % group) * d;
    }

    void place(float *x, const float *gain, int64_t position, float scale) const {
        if (gain) norm(x, gain, x, d, a.epsilon);
        rotate(x, a.cosines + position * (d / 2), a.sines + position * (d / 2), d / 2);
        for (int i = 0; i < d; ++i) x[i] *= scale;
    }

    void remember(int64_t t) const {
        const float scale = 1.0f / std::sqrt(float(d));
        const int64_t position = span.position + t, block = start(position / POSITIONS), at = position % POSITIONS;
        float *key = a.qkv + (span.first + t) * wide + (a.heads + head) * d;
        place(key, a.k_norm, position, 1.0f);
        for (int i = 0; i < d; ++i) a.keys[block + i * POSITIONS + at] = key[i];
        std::memcpy(a.values + block + at * d, key + a.kv_heads * d, sizeof(float) * d);
        for (int of = 0; of < group && t >= unwanted(); ++of) place(query(t * group + of), a.q_norm, position, scale);
    }

    template <int N>
    void attend(int64_t row) const {
        const int64_t most = span.position + (row + N - 1) / group + 1;  // positions that the last of them sees
        constexpr int PART = SUMS<N> * LANES;  // of a block
        const int64_t length = (most + PART - 1) / PART * PART;
        const float *queries[N];
        for (int n = 0; n < N; ++n) queries[n] = query(row + n);
        scores.resize(QUERIES * length);
        for (int64_t first = 0; first < length; first += PART) {
            Lanes sums[N][SUMS<N>] = {};
            const int64_t block = first / POSITIONS, place = first % POSITIONS;
            const bool last = (block + 1) * POSITIONS >= length;
            const float *key = a.keys + start(block) + place;
            const float *next = (last ? a.values + start(0) : a.keys + start(block + 1)) + place * d;
            for (int i = 0; i < d; ++i, key += POSITIONS, next += PART) {
                for (int j = 0; j < PART; j += LINE) __builtin_prefetch(next + j);
                for (int n = 0; n < N; ++n)
                    for (int j = 0; j < SUMS<N>; ++j) sums[n][j] += queries[n][i] * read(key + j * LANES);
            }
            for (int n = 0; n < N; ++n)
                for (int j = 0; j < SUMS<N>; ++j) write(scores.data() + n * length + first + j * LANES, sums[n][j]);
        }
        float inverse[N];
        for (int n = 0; n < N; ++n) {
            float *weights = scores.data() + n * length;
            const int64_t seen = span.position + (row + n) / group + 1;
            inverse[n] = 1.0f / exponentials(weights, int(seen));
            std::memset(weights + seen, 0, sizeof(float) * (most - seen));
        }
        int i = 0;
        for (; i + PART <= d; i += PART) mix<N, SUMS<N>>(row, i, most, length, inverse);
        for (; i + LANES <= d; i += LANES) mix<N, 1>(row, i, most, length, inverse);
        for (; i < d; ++i)
            for (int n = 0; n < N; ++n) {
                float sum = 0.0f;
                for (int64_t position = 0; position < most; ++position)
                    sum += scores[n * length + position] *
                           a.values[start(position / POSITIONS) + position % POSITIONS * d + i];
                out(row + n)[i] = sum * inverse[n];
            }
    }

    // What lies beyond the positions seen is of nobody, and is not read: it might be no numbers.
    template <int N, int WIDE>
    void mix(int64_t row, int at, int64_t most, int64_t length, const float *inverse) const {
        Lanes sums[N][WIDE] = {};
        for (int64_t first = 0; first < most; first += POSITIONS) {
            const float *value = a.values + start(first / POSITIONS) + at, *weight = scores.data() + first;
            const bool last = first + POSITIONS >= most;
            const float *next = last ? value : a.values + start(first / POSITIONS + 1) + at;
            const int64_t places = last ? most - first : POSITIONS;
            for (int64_t place = 0; place < places; ++place, value += d, next += d) {
                for (int j = 0; j < WIDE * LANES; j += LINE) __builtin_prefetch(next + j);
                for (int n = 0; n < N; ++n)
                    for (int j = 0; j < WIDE; ++j) sums[n][j] += weight[n * length + place] * read(value + j * LANES);
            }
        }
        for (int n = 0; n < N; ++n)
            for (int j = 0; j < WIDE; ++j) write(out(row + n) + at + j * LANES, sums[n][j] * inverse[n]);
    }

    void attend_all() const { attend_from<QUERIES>(unwanted() * group); }

    template <int N>
    void attend_from(int64_t row) const {
        for (; row + N <= span.tokens * group; row += N) attend<N>(row);
        if constexpr (N > 1) attend_from<N - 1>(row);
    }
};

// Heads of keys and values `first` to `last` of all spans: any part may be done beside the others.
void attend(const Attention &attention, int first, int last) {
    static thread_local std::vector<float> room;
    for (int64_t i = 0; i < attention.spans; ++i) {
        const Span &span = attention.span[i];
        for (int64_t t = 0; t < span.tokens; ++t)
            for (int head = first; head < last; ++head) Head(attention, span, head, room).remember(t);
        for (int head = first; head < last; ++head) Head(attention, span, head, room).attend_all();
    }
}

}  // namespace

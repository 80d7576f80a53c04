// What a step with prompts in fp32 is made of: products by panels, and what stands between them: norms, angles, attention
// over the paged cache, gates. engine/prompts.py calls this.
//
// Legend: N = tokens, D = width, H, K = query and key/value heads, G = H / K, d = head width, F = feed-forward width,
// P = positions of a block of the cache.

#include "../decoder/panels.h"

extern "C" {

struct Span {
    int64_t first, tokens, position;  // of its tokens in the step; how many; where the first stands in its sequence
    const int32_t *blocks;            // of its sequence
};

struct Attention {
    int32_t heads, kv_heads, head_width, block_tokens;
    float epsilon;
    const float *q_norm, *k_norm;  // [d], or null
    const float *cosines, *sines;  // [positions, d / 2]
    int64_t spans;
    const Span *span;
    float *qkv;                    // [N, (H + 2 K) d]; queries and keys are turned in place
    float *keys, *values;          // [(block K + head) P + place, d]
    float *mixed;                  // out: [N, H d]
};

}  // extern "C"

namespace {

constexpr int POSITIONS = 32;               // of a block of the cache
constexpr int VECTORS = POSITIONS / LANES;  // of its positions, and of what is mixed at once
constexpr int ROWS = 12 / VECTORS;          // queries at once: so many sums are under way beside what is multiplied

// Attention of one head of keys and values in one span.
struct Head {
    const Attention &a;
    const Span &span;
    const int head, d, group;
    const int64_t wide, blocks;
    std::vector<float> turned, scores;  // keys [blocks, d, P]; [ROWS, positions]

    Head(const Attention &all, const Span &of, int index)
        : a(all), span(of), head(index), d(all.head_width), group(all.heads / all.kv_heads),
          wide(int64_t(all.heads + 2 * all.kv_heads) * all.head_width),
          blocks((of.position + of.tokens + POSITIONS - 1) / POSITIONS), turned(blocks * d * POSITIONS),
          scores(ROWS * blocks * POSITIONS) {}

    int64_t start(int64_t block) const { return (int64_t(span.blocks[block]) * a.kv_heads + head) * POSITIONS * d; }

    float *query(int64_t row) const { return a.qkv + (span.first + row / group) * wide + (head * group + row % group) * d; }

    void place(float *x, const float *gain, int64_t position, float scale) const {
        if (gain) norm(x, gain, x, d, a.epsilon);
        rotate(x, a.cosines + position * (d / 2), a.sines + position * (d / 2), d / 2);
        for (int i = 0; i < d; ++i) x[i] *= scale;
    }

    void remember() {
        for (int64_t t = 0; t < span.tokens; ++t) {
            const int64_t position = span.position + t, at = start(position / POSITIONS) + position % POSITIONS * d;
            float *key = a.qkv + (span.first + t) * wide + (a.heads + head) * d;
            place(key, a.k_norm, position, 1.0f);
            std::memcpy(a.keys + at, key, sizeof(float) * d);
            std::memcpy(a.values + at, key + a.kv_heads * d, sizeof(float) * d);
            for (int of = 0; of < group; ++of)
                place(query(t * group + of), a.q_norm, position, 1.0f / std::sqrt(float(d)));
        }
        for (int64_t block = 0; block < blocks; ++block)
            for (int place = 0; place < POSITIONS; ++place)
                for (int i = 0; i < d; ++i)
                    turned[(block * d + i) * POSITIONS + place] = a.keys[start(block) + place * d + i];
    }

    template <int N>
    void attend(int64_t row) {
        const int64_t length = blocks * POSITIONS;
        const int64_t seen_blocks = (span.position + (row + N - 1) / group) / POSITIONS + 1;
        for (int64_t block = 0; block < seen_blocks; ++block) {
            Lanes sums[N][VECTORS] = {};
            const float *key = turned.data() + block * d * POSITIONS;
            for (int i = 0; i < d; ++i, key += POSITIONS)
                for (int n = 0; n < N; ++n) {
                    const float x = query(row + n)[i];
                    for (int j = 0; j < VECTORS; ++j) sums[n][j] += x * read(key + j * LANES);
                }
            for (int n = 0; n < N; ++n)
                for (int j = 0; j < VECTORS; ++j)
                    write(scores.data() + n * length + block * POSITIONS + j * LANES, sums[n][j]);
        }
        float inverse[N];
        for (int n = 0; n < N; ++n) {
            float *weights = scores.data() + n * length;
            const int seen = int(span.position + (row + n) / group + 1);
            inverse[n] = 1.0f / exponentials(weights, seen);
            std::memset(weights + seen, 0, sizeof(float) * (seen_blocks * POSITIONS - seen));
        }
        int i = 0;
        for (; i + POSITIONS <= d; i += POSITIONS) mix<N, VECTORS>(row, i, seen_blocks, inverse);
        for (; i + LANES <= d; i += LANES) mix<N, 1>(row, i, seen_blocks, inverse);
        for (; i < d; ++i)
            for (int n = 0; n < N; ++n) {
                float sum = 0.0f;
                for (int64_t block = 0; block < seen_blocks; ++block)
                    for (int place = 0; place < POSITIONS; ++place)
                        sum += scores[n * length + block * POSITIONS + place] * a.values[start(block) + place * d + i];
                out(row + n)[i] = sum * inverse[n];
            }
    }

    float *out(int64_t row) const {
        return a.mixed + ((span.first + row / group) * a.heads + head * group + row % group) * d;
    }

    template <int N, int WIDE>
    void mix(int64_t row, int at, int64_t seen_blocks, const float *inverse) {
        Lanes sums[N][WIDE] = {};
        for (int64_t block = 0; block < seen_blocks; ++block) {
            const float *value = a.values + start(block) + at, *weight = scores.data() + block * POSITIONS;
            for (int place = 0; place < POSITIONS; ++place, value += d)
                for (int n = 0; n < N; ++n)
                    for (int j = 0; j < WIDE; ++j)
                        sums[n][j] += weight[n * blocks * POSITIONS + place] * read(value + j * LANES);
        }
        for (int n = 0; n < N; ++n)
            for (int j = 0; j < WIDE; ++j) write(out(row + n) + at + j * LANES, sums[n][j] * inverse[n]);
    }

    void run() {
        remember();
        int64_t row = 0;
        for (; row + ROWS <= span.tokens * group; row += ROWS) attend<ROWS>(row);
        for (; row < span.tokens * group; ++row) attend<1>(row);
    }
};

}  // namespace

extern "C" {

// For heads of keys and values `first` to `last`: any part may be done beside the others.
void tunesmith_attend(const Attention *attention, int32_t first, int32_t last) {
    for (int64_t i = 0; i < attention->spans; ++i)
        for (int head = first; head < last; ++head) Head(*attention, attention->span[i], head).run();
}

// x [N, D] += added, where given; y = x over the root of its mean square, times gain
void tunesmith_norm(float *x, const float *added, const float *gain, float epsilon, int64_t tokens, int32_t width,
                    float *y) {
    for (int64_t t = 0; t < tokens; ++t, x += width, y += width) {
        for (int i = 0; added && i < width; ++i) x[i] += added[t * width + i];
        norm(x, gain, y, width, epsilon);
    }
}

// [N, 2 F] -> [N, F]
void tunesmith_gate(const float *gate_up, int64_t tokens, int32_t width, float *product) {
    for (int64_t t = 0; t < tokens; ++t, gate_up += 2 * width, product += width)
        gated(gate_up, gate_up + width, product, width);
}

}  // extern "C"

// A model of the Llama family as products by tiles read it, and adapters for it (decoder/packed.py has the same structures).
//
// Legend: D = model width, F = feed-forward width, H, K = query and key/value heads, d = head width, W = (H + 2K) d,
// R = rank, S = rank rounded up to a block, P = linear layers stacked in a site, I, O = inputs and outputs of a site,
// V = vocabulary.

#pragma once

#include <vector>

#include "tiles.h"

extern "C" {

struct Site {
    const bf16 *forward, *backward;  // packed: [I -> O] and [O -> I], times the gain of the norm before it
    const float *gain;               // [I], of that norm; null where there is none
    int32_t inputs, parts, outputs[3];
};

struct Layer {
    Site sites[4];    // qkv, o, gate_up, down
    const float *bias;  // [W] of qkv, or null
};

struct Model {
    int32_t width, layers, heads, kv_heads, head_width, feed_width, vocabulary;
    float epsilon;
    const float *embedding, *norm, *head;         // [V, D], [D], [V, D]
    const bf16 *head_forward, *head_backward;     // packed: [D -> V] and [V -> D]
    const float *cos, *sin;                       // [positions, d / 2]
    const Layer *layer;
};

}  // extern "C"

namespace {

// Memory handed out from a piece given by the caller; from none, it counts.
struct Arena {
    uint8_t *base;
    int64_t used = 0;

    template <typename T>
    T *take(int64_t n) {
        T *at = base ? reinterpret_cast<T *>(base + used) : nullptr;
        used += (n * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
        return at;
    }

    Panels panels(int64_t rows, int64_t columns) { return {take<bf16>(rows * columns), rows}; }
};

int64_t outputs_of(const Site &site) {
    int64_t total = 0;
    for (int part = 0; part < site.parts; ++part) total += site.outputs[part];
    return total;
}

// Where the factors of a site stand in `flat`, and where packed: A for [I -> P S] and [P S -> I], B part by part for
// [R -> O] and [O -> R].
struct Place {
    int64_t a, b, a_forward, a_backward, b_forward[3], b_backward[3];
};

struct Places {
    std::vector<Place> sites;
    int64_t flat = 0, packed = 0;  // where the embedding's stand; how many elements are packed

    // Without `both` nothing is packed for the way back.
    Places(const Model &m, int64_t rank, bool both) {
        const int64_t deep = rounded_up(rank);
        for (int64_t index = 0; index < 4 * m.layers; ++index) {
            const Site &site = m.layer[index / 4].sites[index % 4];
            Place place{};
            place.a = flat;
            place.b = flat + site.parts * rank * site.inputs;
            flat = place.b + outputs_of(site) * rank;
            place.a_forward = packed;
            place.a_backward = packed + packed_size(site.inputs, site.parts * deep);
            packed = place.a_backward + both * packed_size(site.inputs, site.parts * deep);
            for (int part = 0; part < site.parts; ++part) {
                place.b_forward[part] = packed;
                place.b_backward[part] = packed + packed_size(rank, site.outputs[part]);
                packed += (both ? 2 : 1) * packed_size(rank, site.outputs[part]);
            }
            sites.push_back(place);
        }
    }
};

void pack_factors(const Model &m, const float *flat, int64_t rank, float scale, bool both, bf16 *packed) {
    const Places places(m, rank, both);
    const int64_t deep = rounded_up(rank);
    for (int64_t index = 0; index < 4 * m.layers; ++index) {
        const Site &site = m.layer[index / 4].sites[index % 4];
        const Place &at = places.sites[index];
        const float *a = flat + at.a, *b = flat + at.b;
        for (int part = 0; part < site.parts; ++part) {
            const int64_t before = part * deep, outputs = site.outputs[part];
            pack_forward(a, rank, site.inputs, site.gain, 1.0f, packed + at.a_forward + before * site.inputs);
            pack_forward(b, outputs, rank, nullptr, scale, packed + at.b_forward[part]);
            if (both) {
                pack_backward(a, rank, site.inputs, site.gain, 1.0f, packed + at.a_backward + before * SIDE,
                              site.parts * deep * SIDE);
                pack_backward(b, outputs, rank, nullptr, scale, packed + at.b_backward[part], outputs * SIDE);
            }
            a += rank * site.inputs;
            b += outputs * rank;
        }
    }
}

// ---- what stands between products of a layer ---------------------------------------------------------------------------

// x [tokens, D] += added, where given; `to` = x over the root of its mean square; one over that root, where asked for.
inline void normalise(const Model &m, float *x, const Panels *added, Panels to, float *inverses, int64_t tokens) {
    const int64_t d = m.width;
    for (int64_t i = 0; i < tokens; ++i) {
        float *row = x + i * d;
        __m512 squares[2] = {};
        for (int64_t j = 0; j < d; j += SIDE)
            for (int64_t half = 0; half < 2; ++half) {
                float *at = row + j + 16 * half;
                __m512 value = _mm512_loadu_ps(at);
                if (added) {
                    value = _mm512_add_ps(value, load_low(added->block(j / SIDE, i) + 16 * half));
                    _mm512_storeu_ps(at, value);
                }
                squares[half] = _mm512_fmadd_ps(value, value, squares[half]);
            }
        const float mean = sum(_mm512_add_ps(squares[0], squares[1])) / static_cast<float>(d);
        const float factor = root_of_inverse(mean + m.epsilon);
        const __m512 f = _mm512_set1_ps(factor);
        if (inverses) inverses[i] = factor;
        for (int64_t j = 0; j < d; j += SIDE)
            store_32(to.block(j / SIDE, i), _mm512_mul_ps(_mm512_loadu_ps(row + j), f),
                     _mm512_mul_ps(_mm512_loadu_ps(row + j + 16), f));
    }
}

// Queries and keys by the angles of their places, queries over the root of d as well.
// `place`: that of each token in its row, or -1. `bias`, where given, is added to all before.
inline void turn(const Model &m, Panels qkv, const float *bias, const int32_t *place, int64_t tokens) {
    const int64_t d = m.head_width, half = d / 2, panels = (m.heads + 2 * m.kv_heads) * d / SIDE;
    for (int64_t panel = 0; bias && panel < panels; ++panel)
        for (int64_t at = 0; at < tokens; ++at) {
            bf16 *to = qkv.block(panel, at);
            const float *more = bias + panel * SIDE;
            store_32(to, _mm512_add_ps(load_low(to), _mm512_loadu_ps(more)),
                     _mm512_add_ps(load_low(to + 16), _mm512_loadu_ps(more + 16)));
        }
    for (int64_t head = 0; head < m.heads + m.kv_heads; ++head) {
        const __m512 scale = _mm512_set1_ps(head < m.heads ? root_of_inverse(static_cast<float>(d)) : 1.0f);
        for (int64_t j = 0; j < half; j += 16) {
            const int64_t low_at = head * d + j, high_at = low_at + half;
            for (int64_t at = 0; at < tokens; ++at) {
                if (place[at] < 0) continue;
                bf16 *low_part = qkv.block(low_at / SIDE, at) + low_at % SIDE;
                bf16 *high_part = qkv.block(high_at / SIDE, at) + high_at % SIDE;
                const __m512 cos = _mm512_mul_ps(_mm512_loadu_ps(m.cos + place[at] * half + j), scale);
                const __m512 sin = _mm512_mul_ps(_mm512_loadu_ps(m.sin + place[at] * half + j), scale);
                const __m512 a = load_low(low_part), b = load_low(high_part);
                store_16(low_part, _mm512_fmsub_ps(a, cos, _mm512_mul_ps(b, sin)));
                store_16(high_part, _mm512_fmadd_ps(b, cos, _mm512_mul_ps(a, sin)));
            }
        }
    }
}

inline __m512 gated(__m512 gate, __m512 up) { return _mm512_mul_ps(_mm512_mul_ps(gate, sigmoid(gate)), up); }

// product = silu(gate) * up
inline void gate(const Model &m, Panels gate_up, Panels product, int64_t tokens) {
    for (int64_t panel = 0; panel < m.feed_width / SIDE; ++panel) {
        const bf16 *g = gate_up.block(panel, 0), *up = gate_up.block(panel + m.feed_width / SIDE, 0);
        bf16 *to = product.block(panel, 0);
        for (int64_t i = 0; i < tokens * SIDE; i += 16) store_16(to + i, gated(load_low(g + i), load_low(up + i)));
    }
}

}  // namespace

extern "C" {

// Whether the system lets this process multiply: tiles are to be asked for.
bool tunesmith_tiles() {
#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return true;
#endif
}

int64_t tunesmith_packed_size(int64_t rows, int64_t columns) { return packed_size(rows, columns); }

// A matrix [O, I], times `gain` [I] where given, as what forward products read, and backward ones, where asked for.
void tunesmith_pack(const float *from, int64_t outputs, int64_t inputs, const float *gain, bf16 *forward,
                    bf16 *backward) {
    pack_forward(from, outputs, inputs, gain, 1.0f, forward);
    if (backward) pack_backward(from, outputs, inputs, gain, 1.0f, backward, rounded_up(outputs) * SIDE);
}

int64_t tunesmith_packed_factors_size(const Model *model, int64_t rank, bool both) {
    return Places(*model, rank, both).packed;
}

void tunesmith_pack_factors(const Model *model, const float *flat, int64_t rank, float scale, bool both, bf16 *packed) {
    pack_factors(*model, flat, rank, scale, both, packed);
}

}  // extern "C"

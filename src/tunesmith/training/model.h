// What step.cpp is given (training/step.py has the same structures), and where factors of adapters stand in it.
//
// Legend: as in step.cpp.

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

struct Piece {
    int64_t start, tokens;  // multiples of 32
    const float *flat;      // factors as TrainableLora.flat has them
    float *gradient;        // laid out as they are; added to
    const bf16 *packed;     // what tunesmith_pack_factors made of them
    int32_t rank, embedding_rank;
    float scale;
};

struct Pass {
    int64_t tokens, rows, positions, pieces;
    const int64_t *token_ids;                  // [N]
    const int64_t *row_start, *row_length;     // [rows]
    const int64_t *predicting, *target;        // [M]
    const float *weight;                       // [M]
    const Piece *piece;
    float *nll;   // out: [M]
    bool *right;  // out: [M]
    uint8_t *memory;
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

    Places(const Model &m, int64_t rank) {
        const int64_t deep = rounded_up(rank);
        for (int64_t index = 0; index < 4 * m.layers; ++index) {
            const Site &site = m.layer[index / 4].sites[index % 4];
            Place place{};
            place.a = flat;
            place.b = flat + site.parts * rank * site.inputs;
            flat = place.b + outputs_of(site) * rank;
            place.a_forward = packed;
            place.a_backward = packed + packed_size(site.inputs, site.parts * deep);
            packed = place.a_backward + packed_size(site.inputs, site.parts * deep);
            for (int part = 0; part < site.parts; ++part) {
                place.b_forward[part] = packed;
                place.b_backward[part] = packed + packed_size(rank, site.outputs[part]);
                packed += 2 * packed_size(rank, site.outputs[part]);
            }
            sites.push_back(place);
        }
    }
};

void pack_factors(const Model &m, const float *flat, int64_t rank, float scale, bf16 *packed) {
    const Places places(m, rank);
    const int64_t deep = rounded_up(rank);
    for (int64_t index = 0; index < 4 * m.layers; ++index) {
        const Site &site = m.layer[index / 4].sites[index % 4];
        const Place &at = places.sites[index];
        const float *a = flat + at.a, *b = flat + at.b;
        for (int part = 0; part < site.parts; ++part) {
            const int64_t before = part * deep, outputs = site.outputs[part];
            pack_forward(a, rank, site.inputs, site.gain, 1.0f, packed + at.a_forward + before * site.inputs);
            pack_backward(a, rank, site.inputs, site.gain, 1.0f, packed + at.a_backward + before * SIDE,
                          site.parts * deep * SIDE);
            pack_forward(b, outputs, rank, nullptr, scale, packed + at.b_forward[part]);
            pack_backward(b, outputs, rank, nullptr, scale, packed + at.b_backward[part], outputs * SIDE);
            a += rank * site.inputs;
            b += outputs * rank;
        }
    }
}

}  // namespace

// Products of any tokens with the weights of a model, of bf16 or 8 bits, by tiles or row by row: the same sums either way.

#pragma once

#include "../decoder/packed.h"
#include "int8.h"
#include "rows.h"

namespace {

constexpr int64_t CHUNK = 256;  // tokens that go through products together: their states stay in the cache
constexpr int64_t FEW = 3;      // up to so many rows are multiplied one by one, without tiles

// Adds 32 rows of `a`, `steps` blocks that lie `stride` apart, times tiles that lie `step` apart, of two columns of 16.
inline void accumulate_apart(const bf16 *a, int64_t stride, const bf16 *left, const bf16 *right, int64_t step,
                             int64_t steps) {
    settle();
    for (int64_t s = 0; s < steps; ++s, a += stride, left += step, right += step) {
        _tile_loadd(4, a, 64);
        _tile_loadd(6, left, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, right, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + BLOCK / 2, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

// As `accumulate` of blocks side by side, and `take_sums`, where `top` of the first 16 rows alone.
inline void accumulate_rows(bool top, const bf16 *a, const bf16 *b, int64_t steps) {
    if (!top) return accumulate(a, BLOCK, b, steps);
    settle();
    for (int64_t s = 0; s < steps; ++s, a += BLOCK, b += BLOCK) {
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + BLOCK / 2, 64);
        _tile_dpbf16ps(1, 4, 7);
    }
}

inline void take_rows(bool top, float *c) {
    if (!top) return take_sums(c);
    _tile_stored(0, c, 128);
    _tile_stored(1, c + 16, 128);
}

// What products need beside their operands.
struct Scratch {
    float *partial, *row;  // sums under way, [CHUNK, 32]; a token's state, [widest]
    Bytes eight;
    uint8_t *raised;       // a token's state in 8 bits, each number 128 more than it is
};

Scratch take_scratch(Arena &arena, int64_t widest) {
    const int64_t deep = rounded_deep(widest);
    return {arena.take<float>(CHUNK * SIDE), arena.take<float>(deep),
            {arena.take<int8_t>(CHUNK * deep), arena.take<float>(CHUNK), CHUNK}, arena.take<uint8_t>(deep)};
}

// The product of `live` tokens, whose states begin at `in`, with weights [outputs, inputs], times `gain` where their 8 bits
// leave it out. Few tokens: one(panel, token, sums of 32). Many: then(panel, first of 32 tokens); the sums of bf16 are in
// tiles then, those of 8 bits in `c`.
template <typename One, typename Then>
void multiply(const void *weights, bool eight, int64_t inputs, int64_t outputs, const float *gain, Panels in, int64_t live,
              const Scratch &scratch, float *c, One one, Then then) {
    const int64_t panels = rounded_up(outputs) / SIDE, steps = rounded_deep(inputs) / DEEP, whole = rounded_up(live);
    const Eight of_eight(weights, outputs);
    const bf16 *tiles = static_cast<const bf16 *>(weights);
    if (eight)
        for (int64_t i = 0; i < live; ++i) round_to_eight(in, i, inputs, gain, scratch.eight);
    if (live <= FEW) {
        for (int64_t i = 0; i < live; ++i) {
            widen(in, i, inputs, scratch.row);
            for (int64_t j = 0; eight && j < steps; ++j)
                _mm512_storeu_si512(scratch.raised + j * DEEP, _mm512_xor_si512(_mm512_loadu_si512(scratch.eight.block(j, i)),
                                                                               _mm512_set1_epi8(-128)));
            for (int64_t panel = 0; panel < panels; ++panel) {
                if (eight) {
                    multiply_eight_row(scratch.raised, scratch.eight.scales[i], of_eight, panel, steps, c);
                } else {
                    __m512 sums[2] = {};
                    add_columns<2, 2>(scratch.row, tiles + panel * SIDE * inputs, BLOCK / 2, BLOCK, inputs / 2, sums);
                    _mm512_storeu_ps(c, sums[0]);
                    _mm512_storeu_ps(c + 16, sums[1]);
                }
                one(panel, i, c);
            }
        }
    } else if (eight) {
        const int64_t lines = 2 * ((SIDE + whole / SIDE - 1) / (whole / SIDE));
        for (int64_t panel = 0; panel < panels; ++panel)
            for (int64_t at = 0; at < whole; at += SIDE) {
                multiply_eight(scratch.eight, at, of_eight, panel, steps, panel + 1 < panels ? lines : 0, c);
                then(panel, at);
            }
    } else {
        by_panels(in, tiles, inputs / SIDE, panels, whole, scratch.partial, then);
    }
}

}  // namespace

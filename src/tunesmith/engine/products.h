// Products of any tokens with the weights of a model, of bf16 or 8 bits, by tiles or row by row: the same sums either way.

#pragma once

#include "../decoder/packed.h"
#include "int8.h"
#include "rows.h"

namespace {

constexpr int64_t CHUNK = 256;  // tokens that go through products together: their states stay in the cache
constexpr int64_t FEW = 3;      // up to so many rows are multiplied one by one, without tiles

// As `accumulate` of blocks side by side, and `take_sums`, where `top` of the first 16 rows alone.
inline void accumulate_rows(bool top, const bf16 *a, const bf16 *b, int64_t steps) {
    top ? accumulate<false>(a, BLOCK, b, steps) : accumulate(a, BLOCK, b, steps);
}

inline void take_rows(bool top, float *c) { top ? take_sums<false>(c) : take_sums(c); }

// What products need beside their operands.
struct Scratch {
    float *partial, *row;  // sums under way, [CHUNK, 32]; a token's state, [widest]
    Fine eight;            // the states of a product
};

inline Bytes take_bytes(Arena &arena, int64_t rows, int64_t columns) {
    return {arena.take<int8_t>(rows * rounded_deep(columns)), arena.take<float>(rows), arena.take<int32_t>(rows), rows};
}

inline Fine take_fine(Arena &arena, int64_t rows, int64_t columns) {
    return {take_bytes(arena, rows, columns), take_bytes(arena, rows, columns)};
}

inline Scratch take_scratch(Arena &arena, int64_t widest) {
    return {arena.take<float>(CHUNK * SIDE), arena.take<float>(widest), take_fine(arena, CHUNK, widest)};
}

// The states of `live` tokens in 8 bits, times `gain` where given, which is not in weights of 8 bits.
inline void round_states(Panels in, int64_t columns, const float *gain, int64_t live, Fine to, bool fine) {
    for (int64_t i = 0; i < live; ++i)
        round_to_eight(
            [&](int64_t j) {
                const __m512 x = load_low(in.block(j / SIDE, i) + j % SIDE);
                return gain ? times(x, _mm512_loadu_ps(gain + j)) : x;
            },
            columns, to, i, fine);
}

// The product of `live` tokens, whose states begin at `in` (of 8 bits: are in `scratch`), with weights [outputs, inputs].
// Few tokens: one(panel, token, sums of 32). Many: then(panel, first of 32 tokens); the sums of bf16 are in tiles then,
// those of 8 bits in `c`.
template <typename One, typename Then>
void multiply(const void *weights, bool eight, int64_t inputs, int64_t outputs, Panels in, int64_t live,
              const Scratch &scratch, float *c, One one, Then then) {
    const int64_t panels = rounded_up(outputs) / SIDE, steps = rounded_deep(inputs) / DEEP, whole = rounded_up(live);
    const Eight of_eight(weights, outputs, inputs);
    const bf16 *tiles = static_cast<const bf16 *>(weights);
    if (live <= FEW) {
        for (int64_t i = 0; i < live; ++i) {
            if (!eight) widen(in, i, inputs, scratch.row);
            for (int64_t panel = 0; panel < panels; ++panel) {
                __m512 sums[2] = {};
                if (eight)
                    for (int64_t half = 0; half < 2; ++half)
                        sums[half] = scaled(
                            multiply_eight_row(scratch.eight.high, i, of_eight.column(2 * panel + half), of_eight.length),
                            scratch.eight.high, i, _mm512_loadu_ps(of_eight.scales + panel * SIDE + 16 * half));
                else
                    add_columns<2, 2>(scratch.row, tiles + panel * SIDE * inputs, BLOCK / 2, BLOCK, inputs / SIDE, sums);
                _mm512_storeu_ps(c, sums[0]);
                _mm512_storeu_ps(c + 16, sums[1]);
                one(panel, i, c);
            }
        }
    } else if (eight) {
        alignas(64) int32_t sums[BLOCK];
        const int64_t lines = 2 * ((16 + whole / SIDE - 1) / (whole / SIDE));
        for (int64_t panel = 0; panel < panels; ++panel) {
            const uint8_t *column = of_eight.column(2 * panel), *next = of_eight.column(2 * panel + 2);
            const __m512 left = _mm512_loadu_ps(of_eight.scales + panel * SIDE);
            const __m512 right = _mm512_loadu_ps(of_eight.scales + panel * SIDE + 16);
            for (int64_t at = 0; at < whole; at += SIDE) {
                multiply_eight(scratch.eight.high, at, column, of_eight.column(2 * panel + 1), steps, sums,
                               next + at / SIDE * lines * steps * DEEP, panel + 1 < panels ? lines : 0);
                for (int64_t i = 0; i < SIDE; ++i) {
                    const int32_t *from = sums + i * SIDE;
                    _mm512_store_ps(c + i * SIDE, scaled(_mm512_load_si512(from), scratch.eight.high, at + i, left));
                    _mm512_store_ps(c + i * SIDE + 16, scaled(_mm512_load_si512(from + 16), scratch.eight.high, at + i, right));
                }
                then(panel, at);
            }
        }
    } else {
        by_panels(in, tiles, inputs / SIDE, panels, whole, scratch.partial, then);
    }
}

}  // namespace

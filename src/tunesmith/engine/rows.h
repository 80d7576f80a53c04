// Products of single rows with what is packed for tiles, without tiles, to the same bits: for one row they are faster.
//
// A tile product adds, for every 32 numbers of depth, the products of the even ones and those of the odd ones, each from 0
// on and rounded once a step, and then the sum of both; numbers too small to be normal are 0. So does this, in mode `Flush`.
// Where there are no tiles, pairs are added one after another, here as there.

#pragma once

#include "../decoder/tiles.h"

namespace {

// Numbers too small to be normal are 0 while this lives, as they always are in tiles.
struct Flush {
    const unsigned before = _mm_getcsr();
    Flush() { _mm_setcsr(before | 0x8040); }
    ~Flush() { _mm_setcsr(before); }
};

// Sums and products that the compiler may not put in another order.
inline __m512 plus(__m512 a, __m512 b) { return _mm512_add_round_ps(a, b, _MM_FROUND_CUR_DIRECTION); }
inline __m512 times(__m512 a, __m512 b) { return _mm512_mul_round_ps(a, b, _MM_FROUND_CUR_DIRECTION); }

constexpr int64_t AHEAD = 4 * BLOCK;  // elements before they are read, weights are asked for

// c[j] += x [32 DEEP] times column j of 16. Columns lie `column` elements apart,
// the 32 deep after those `deep` apart.
template <int COLUMNS, int DEEP>
inline void add_blocks(const float *x, const bf16 *w, int64_t column, int64_t deep, __m512 *c) {
#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
    __m512 even[DEEP][COLUMNS], odd[DEEP][COLUMNS];
    for (int k = 0; k < DEEP; ++k)
        for (int j = 0; j < COLUMNS; ++j) even[k][j] = odd[k][j] = _mm512_setzero_ps();
    for (int64_t i = 0; i < 16; ++i, w += SIDE)
        for (int k = 0; k < DEEP; ++k) {
            const __m512 first = _mm512_set1_ps(x[SIDE * k + 2 * i]), second = _mm512_set1_ps(x[SIDE * k + 2 * i + 1]);
            for (int j = 0; j < COLUMNS; ++j) {
                const bf16 *at = w + k * deep + j * column;
                const __m512i words = _mm512_loadu_si512(at);
                _mm_prefetch(at + AHEAD, _MM_HINT_T0);
                const __m512 low = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
                const __m512 high = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(~0xffff)));
                even[k][j] = _mm512_fmadd_ps(first, low, even[k][j]);
                odd[k][j] = _mm512_fmadd_ps(second, high, odd[k][j]);
            }
        }
    for (int k = 0; k < DEEP; ++k)
        for (int j = 0; j < COLUMNS; ++j) c[j] = plus(c[j], plus(even[k][j], odd[k][j]));
#else
    alignas(64) int32_t pairs[16 * DEEP];
    for (int k = 0; k < DEEP; ++k)
        _mm512_store_si512(pairs + 16 * k, both(_mm512_loadu_ps(x + SIDE * k), _mm512_loadu_ps(x + SIDE * k + 16)));
    for (int k = 0; k < DEEP; ++k)
        for (int64_t i = 0; i < 16; ++i) {
            const __m512i word = _mm512_set1_epi32(pairs[16 * k + i]);
            for (int j = 0; j < COLUMNS; ++j) {
                const bf16 *at = w + i * SIDE + k * deep + j * column;
                _mm_prefetch(at + AHEAD, _MM_HINT_T0);
                c[j] = OfBf16::add(c[j], word, _mm512_loadu_si512(at));
            }
        }
#endif
}

// The same for any depth, in blocks of 32.
template <int COLUMNS, int DEEP>
inline void add_columns(const float *x, const bf16 *w, int64_t column, int64_t deep, int64_t blocks, __m512 *c) {
    for (; blocks >= DEEP; blocks -= DEEP, x += SIDE * DEEP, w += DEEP * deep)
        add_blocks<COLUMNS, DEEP>(x, w, column, deep, c);
    for (; blocks > 0; --blocks, x += SIDE, w += deep) add_blocks<COLUMNS, 1>(x, w, column, deep, c);
}

// Row `row` of panels as floats.
inline void widen(Panels from, int64_t row, int64_t columns, float *to) {
    for (int64_t j = 0; j < columns; j += 16) _mm512_storeu_ps(to + j, load_low(from.block(j / SIDE, row) + j % SIDE));
}

// Floats rounded to row `row` of panels.
inline void narrow(const float *from, int64_t columns, Panels to, int64_t row) {
    for (int64_t j = 0; j < columns; j += SIDE)
        store_32(to.block(j / SIDE, row), _mm512_loadu_ps(from + j), _mm512_loadu_ps(from + j + 16));
}

}  // namespace

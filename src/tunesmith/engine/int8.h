// Products of weights in 8 bits, a scale for each output, with states in 8 bits, a scale for each token: the sums are
// whole numbers, exact in any order.
//
// Packed: [scales, offsets, panels], a panel being 32 outputs by tiles of 64 deep, two side by side.

#pragma once

#include "rows.h"

namespace {

constexpr int64_t DEEP = 64;                 // numbers of depth of a tile
constexpr int64_t WIDE_BLOCK = SIDE * DEEP;  // of two

inline int64_t rounded_deep(int64_t n) { return (n + DEEP - 1) / DEEP * DEEP; }

struct Eight {
    const float *scales;     // [O], rounded up to panels
    const int32_t *offsets;  // [O]: 128 times the sum of an output's weights
    const int8_t *panels;

    Eight(const void *packed, int64_t outputs)
        : scales(static_cast<const float *>(packed)),
          offsets(reinterpret_cast<const int32_t *>(scales + rounded_up(outputs))),
          panels(reinterpret_cast<const int8_t *>(offsets + rounded_up(outputs))) {}

    static int64_t size(int64_t outputs, int64_t inputs) {
        return rounded_up(outputs) * (8 + rounded_deep(inputs));
    }
};

// A matrix [outputs, inputs] whose rows are rounded to 127 steps up and down.
void pack_eight(const float *from, int64_t outputs, int64_t inputs, uint8_t *packed) {
    std::memset(packed, 0, Eight::size(outputs, inputs));
    const Eight to(packed, outputs);
    for (int64_t o = 0; o < outputs; ++o, from += inputs) {
        float most = 0.0f;
        int32_t total = 0;
        for (int64_t i = 0; i < inputs; ++i) most = std::fmax(most, std::fabs(from[i]));
        int8_t *panel = const_cast<int8_t *>(to.panels) + o / SIDE * SIDE * rounded_deep(inputs) +
                        o % SIDE / 16 * (WIDE_BLOCK / 2) + o % 16 * 4;
        for (int64_t i = 0; i < inputs && most > 0.0f; ++i) {
            const int32_t value = static_cast<int32_t>(std::nearbyint(from[i] / (most / 127.0f)));
            panel[i / DEEP * WIDE_BLOCK + i % DEEP / 4 * DEEP + i % 4] = static_cast<int8_t>(value);
            total += value;
        }
        const_cast<float *>(to.scales)[o] = most / 127.0f;
        const_cast<int32_t *>(to.offsets)[o] = 128 * total;
    }
}

// States of tokens in 8 bits: panels of 64, as `Panels` are of 32.
struct Bytes {
    int8_t *data;
    float *scales;  // by tokens
    int64_t rows;

    int8_t *block(int64_t panel, int64_t row) const { return data + (panel * rows + row) * DEEP; }
};

// Row `row` of `from`, times `gain` where given.
inline void round_to_eight(Panels from, int64_t row, int64_t columns, const float *gain, Bytes to) {
    const auto at = [&](int64_t j) {
        const __m512 x = load_low(from.block(j / SIDE, row) + j % SIDE);
        return gain ? _mm512_mul_ps(x, _mm512_loadu_ps(gain + j)) : x;
    };
    __m512 most = _mm512_setzero_ps();
    for (int64_t j = 0; j < columns; j += 16) most = _mm512_max_ps(_mm512_abs_ps(at(j)), most);
    const float largest = _mm512_reduce_max_ps(most);
    const __m512 factor = _mm512_set1_ps(largest > 0.0f ? 127.0f / largest : 0.0f);
    to.scales[row] = largest / 127.0f;
    for (int64_t j = 0; j < columns; j += 16)
        _mm_store_si128(reinterpret_cast<__m128i *>(to.block(j / DEEP, row) + j % DEEP),
                        _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(at(j), factor))));
    for (int64_t j = columns; j < rounded_deep(columns); j += 16)
        _mm_store_si128(reinterpret_cast<__m128i *>(to.block(j / DEEP, row) + j % DEEP), _mm_setzero_si128());
}

// Sums of 32 tokens and the 32 outputs of a panel, as floats. Meanwhile `lines` cache lines a step are asked for.
inline void multiply_eight(Bytes in, int64_t at, const Eight &w, int64_t panel, int64_t steps, int64_t lines, float *c) {
    alignas(64) int32_t whole[BLOCK];
    const int8_t *b = w.panels + panel * steps * WIDE_BLOCK, *next = b + steps * WIDE_BLOCK;
    next += at / SIDE * lines * steps * DEEP;
    clear();
    settle();
    for (int64_t s = 0; s < steps; ++s, b += WIDE_BLOCK) {
        const int8_t *a = in.block(s, at);
        _tile_loadd(4, a, DEEP);
        _tile_loadd(6, b, DEEP);
        _tile_dpbssd(0, 4, 6);
        _tile_loadd(7, b + WIDE_BLOCK / 2, DEEP);
        _tile_dpbssd(1, 4, 7);
        _tile_loadd(5, a + WIDE_BLOCK / 2, DEEP);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
        for (int64_t i = 0; i < lines; ++i, next += DEEP) _mm_prefetch(next, _MM_HINT_T1);
    }
    take_sums(reinterpret_cast<float *>(whole));
    settle();
    const __m512 left = _mm512_loadu_ps(w.scales + panel * SIDE), right = _mm512_loadu_ps(w.scales + panel * SIDE + 16);
    for (int64_t i = 0; i < SIDE; ++i) {
        const __m512 scale = _mm512_set1_ps(in.scales[at + i]);
        const __m512 low = _mm512_cvtepi32_ps(_mm512_load_si512(whole + i * SIDE));
        const __m512 high = _mm512_cvtepi32_ps(_mm512_load_si512(whole + i * SIDE + 16));
        _mm512_store_ps(c + i * SIDE, times(times(low, scale), left));
        _mm512_store_ps(c + i * SIDE + 16, times(times(high, scale), right));
    }
}

// The same of one token, given as `x` [rounded depth], each number 128 more than it is.
inline void multiply_eight_row(const uint8_t *x, float scale, const Eight &w, int64_t panel, int64_t steps, float *c) {
    const int8_t *b = w.panels + panel * steps * WIDE_BLOCK;
    __m512i sums[2][2] = {};
    for (int64_t s = 0; s < steps; ++s, b += WIDE_BLOCK, x += DEEP)
        for (int64_t i = 0; i < 16; ++i) {
            int32_t four;
            std::memcpy(&four, x + 4 * i, 4);
            for (int64_t half = 0; half < 2; ++half) {
                const int8_t *at = b + half * (WIDE_BLOCK / 2) + i * DEEP;
                _mm_prefetch(at + 4 * WIDE_BLOCK, _MM_HINT_T0);
                sums[i % 2][half] =
                    _mm512_dpbusd_epi32(sums[i % 2][half], _mm512_set1_epi32(four), _mm512_loadu_si512(at));
            }
        }
    for (int64_t half = 0; half < 2; ++half) {
        const int64_t o = panel * SIDE + 16 * half;
        const __m512i whole = _mm512_sub_epi32(_mm512_add_epi32(sums[0][half], sums[1][half]),
                                               _mm512_loadu_si512(w.offsets + o));
        _mm512_storeu_ps(c + 16 * half, times(times(_mm512_cvtepi32_ps(whole), _mm512_set1_ps(scale)),
                                              _mm512_loadu_ps(w.scales + o)));
    }
}

}  // namespace

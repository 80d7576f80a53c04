// Products of weights in 8 bits, a scale for each output, with states in 8 bits, or two digits of 8, a scale for each
// token: the sums are whole numbers, exact in any order.
//
// A weight is kept as 128 more than it is, for one side of such a product has no signs; 128 times the sum of a token's
// state is taken off again. Packed: columns of 16 outputs, each by tiles of 64 deep: 16 rows of four.

#pragma once

#include "rows.h"

namespace {

inline int64_t rounded_deep(int64_t n) { return (n + DEEP - 1) / DEEP * DEEP; }

// Rows 0 to 16, of which `rows` are there, of a matrix [.., depth] as a column; their scales. A column is `fours` rows long.
inline void pack_eight(const float *from, int64_t rows, int64_t depth, int64_t fours, uint8_t *to, float *scales) {
    std::memset(to, 128, fours * DEEP);
    for (int64_t row = 0; row < 16; ++row, from += depth) {
        float most = 0.0f;
        for (int64_t i = 0; i < depth && row < rows; ++i) most = std::fmax(most, std::fabs(from[i]));
        scales[row] = most / 127.0f;
        for (int64_t i = 0; i < depth && most > 0.0f; ++i)
            to[i / 4 * DEEP + row * 4 + i % 4] = static_cast<uint8_t>(128 + std::lrint(from[i] / scales[row]));
    }
}

// States of tokens in 8 bits: panels of 64, as `Panels` are of 32.
struct Bytes {
    int8_t *data;
    float *scales;   // by tokens
    int32_t *shift;  // by tokens: 128 times their sum
    int64_t rows;

    int8_t *block(int64_t panel, int64_t row) const { return data + (panel * rows + row) * DEEP; }
};

// States of tokens by two digits of 8 bits: what the first leaves, 254 times as fine. `low` has no scales of its own.
struct Fine {
    Bytes high, low;
};

constexpr float FINER = 254.0f;

inline void put_bytes(int8_t *to, __m512i words) {
    _mm_storeu_si128(reinterpret_cast<__m128i *>(to), _mm512_cvtsepi32_epi8(words));
}

// A row of `to`: at(j) gives its numbers from j on, 16 at a time. Without `fine` the first digit alone.
template <typename At>
inline void round_to_eight(At at, int64_t columns, Fine to, int64_t row, bool fine) {
    __m512i most = _mm512_setzero_si512();  // as words: what is no number is more than any, and so is its row's scale
    for (int64_t j = 0; j < columns; j += 16)
        most = _mm512_max_epi32(_mm512_castps_si512(_mm512_abs_ps(at(j))), most);
    const int32_t word = _mm512_reduce_max_epi32(most);
    float largest;
    std::memcpy(&largest, &word, sizeof(largest));
    const __m512 factor = _mm512_set1_ps(largest > 0.0f ? 127.0f / largest : 0.0f);
    __m512i total = _mm512_setzero_si512(), total_low = total;
    for (int64_t j = 0; j < rounded_deep(columns); j += 16) {
        const __m512 value = j < columns ? times(at(j), factor) : _mm512_setzero_ps();
        const __m512i whole = _mm512_cvtps_epi32(value);
        total = _mm512_add_epi32(total, whole);
        put_bytes(to.high.block(j / DEEP, row) + j % DEEP, whole);
        if (!fine) continue;
        const __m512i rest = _mm512_cvtps_epi32(
            times(_mm512_sub_ps(value, _mm512_cvtepi32_ps(whole)), _mm512_set1_ps(FINER)));
        total_low = _mm512_add_epi32(total_low, rest);
        put_bytes(to.low.block(j / DEEP, row) + j % DEEP, rest);
    }
    to.high.scales[row] = largest / 127.0f;
    to.high.shift[row] = 128 * _mm512_reduce_add_epi32(total);
    if (fine) to.low.shift[row] = 128 * _mm512_reduce_add_epi32(total_low);
}

// 16 sums of a token as floats: first its scale, then those of the outputs.
inline __m512 scaled(__m512i sums, Bytes in, int64_t row, __m512 scales) {
    const __m512 whole = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums, _mm512_set1_epi32(in.shift[row])));
    return times(times(whole, _mm512_set1_ps(in.scales[row])), scales);
}

inline __m512 scaled(__m512i high, __m512i low, Fine in, int64_t row, __m512 scales) {
    const __m512 first = _mm512_cvtepi32_ps(_mm512_sub_epi32(high, _mm512_set1_epi32(in.high.shift[row])));
    const __m512 rest = _mm512_cvtepi32_ps(_mm512_sub_epi32(low, _mm512_set1_epi32(in.low.shift[row])));
    const __m512 both = _mm512_fmadd_ps(rest, _mm512_set1_ps(1.0f / FINER), first);
    return times(times(both, _mm512_set1_ps(in.high.scales[row])), scales);
}

// Sums of 32 tokens from `at` on and two columns. Meanwhile `lines` cache lines a step are asked for from `next` on.
inline void multiply_eight(Bytes in, int64_t at, const uint8_t *left, const uint8_t *right, int64_t steps, int32_t *sums,
                           const uint8_t *next = nullptr, int64_t lines = 0) {
    clear();
    accumulate_eight(in.block(0, at), in.rows * DEEP, left, right, steps, next, lines);
    take_sums(reinterpret_cast<float *>(sums));
}

inline __m512i four_of(const int8_t *x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return _mm512_set1_epi32(four);
}

inline __m512i add_four(__m512i sums, const uint8_t *weights, const int8_t *x) {
    _mm_prefetch(weights + 8 * TILE_BYTES, _MM_HINT_T0);
    return _mm512_dpbusd_epi32(sums, _mm512_loadu_si512(weights), four_of(x));
}

// Sums of one token and a column `fours` rows long.
inline __m512i multiply_eight_row(Bytes in, int64_t row, const uint8_t *column, int64_t fours) {
    __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
    for (int64_t first = 0; first < fours; first += 16) {
        const int8_t *x = in.block(first / 16, row), *end = x + 4 * (fours - first < 16 ? fours - first : 16);
        for (; x + 16 <= end; x += 16, column += 4 * DEEP) {
            a = add_four(a, column, x);
            b = add_four(b, column + DEEP, x + 4);
            c = add_four(c, column + 2 * DEEP, x + 8);
            d = add_four(d, column + 3 * DEEP, x + 12);
        }
        for (; x < end; x += 4, column += DEEP) a = add_four(a, column, x);
    }
    return _mm512_add_epi32(_mm512_add_epi32(a, b), _mm512_add_epi32(c, d));
}

// The same of both digits: each weight is read once, and what lies `ahead` bytes behind it is asked for.
struct Sums {
    __m512i high, low;
};

inline Sums multiply_eight_row(Fine in, int64_t row, const uint8_t *column, int64_t fours, int64_t ahead) {
    __m512i high[2] = {}, low[2] = {};
    for (int64_t first = 0; first < fours; first += 16) {
        const int8_t *x = in.high.block(first / 16, row), *rest = in.low.block(first / 16, row);
        const int64_t here = fours - first < 16 ? fours - first : 16;
        for (int64_t i = 0; i < here; ++i, column += DEEP) {
            const __m512i weights = _mm512_loadu_si512(column);
            _mm_prefetch(column + ahead, _MM_HINT_T1);
            high[i % 2] = _mm512_dpbusd_epi32(high[i % 2], weights, four_of(x + 4 * i));
            low[i % 2] = _mm512_dpbusd_epi32(low[i % 2], weights, four_of(rest + 4 * i));
        }
    }
    return {_mm512_add_epi32(high[0], high[1]), _mm512_add_epi32(low[0], low[1])};
}

// Those of the first token and `columns` of them, each FOURS rows long: then(sums).
template <int FOURS, typename Then>
inline void multiply_eight_columns(Fine in, const uint8_t *column, int64_t columns, int64_t ahead, Then then) {
    __m512i high[FOURS], low[FOURS];
    for (int i = 0; i < FOURS; ++i) high[i] = four_of(in.high.data + 4 * i), low[i] = four_of(in.low.data + 4 * i);
    for (; columns > 0; --columns) {
        Sums sums{};
        for (int i = 0; i < FOURS; ++i, column += DEEP) {
            const __m512i weights = _mm512_loadu_si512(column);
            _mm_prefetch(column + ahead, _MM_HINT_T1);
            sums.high = _mm512_dpbusd_epi32(sums.high, weights, high[i]);
            sums.low = _mm512_dpbusd_epi32(sums.low, weights, low[i]);
        }
        then(sums);
    }
}

// A matrix [outputs, inputs]: its scales, rounded up to blocks of 32, then its columns.
struct Eight {
    const float *scales;
    const uint8_t *columns;
    const int64_t length;  // of a column, in rows of four

    Eight(const void *packed, int64_t outputs, int64_t inputs)
        : scales(static_cast<const float *>(packed)),
          columns(reinterpret_cast<const uint8_t *>(scales + rounded_up(outputs))), length(rounded_deep(inputs) / 4) {}

    const uint8_t *column(int64_t index) const { return columns + index * length * DEEP; }

    static int64_t size(int64_t outputs, int64_t inputs) { return rounded_up(outputs) * (4 + rounded_deep(inputs)); }

    static void pack(const float *from, int64_t outputs, int64_t inputs, void *packed) {
        const Eight to(packed, outputs, inputs);
        for (int64_t o = 0; o < rounded_up(outputs); o += 16)
            pack_eight(o < outputs ? from + o * inputs : from, outputs - o, inputs, to.length,
                       const_cast<uint8_t *>(to.column(o / 16)), const_cast<float *>(to.scales) + o);
    }
};

}  // namespace

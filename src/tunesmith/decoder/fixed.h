// Products in fixed point, on any processor: weights of 8 or 16 bits in panels, a scale for each column; states of 16
// bits, a scale for each group of a row. Processors without bf16 multiply two such numbers in the time of one in fp32.
// Sums are of whole numbers, and so the same in any order; what they come to as floats is added up from group to group.

#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "panels.h"

namespace {

// Numbers of depth whose products are added up as whole numbers.
template <typename W>
constexpr int64_t GROUP = sizeof(W) == 1 ? 256 : 128;

// The largest number of a weight, and of a state beside it: a sum of a group's products has room for them.
template <typename W>
constexpr int LARGEST = sizeof(W) == 1 ? 127 : 4095;
template <typename W>
constexpr int LARGEST_STATE = sizeof(W) == 1 ? 32767 : 4095;
static_assert(GROUP<int16_t> * 4095 * 4095 <= INT32_MAX && GROUP<int8_t> * 127 * 32767 <= INT32_MAX);

using Pairs = int16_t __attribute__((vector_size(sizeof(float) * LANES)));  // two numbers of depth for each column
using AnyPairs = int16_t __attribute__((vector_size(sizeof(float) * LANES), aligned(2)));
using AnyBytes = int8_t __attribute__((vector_size(2 * LANES), aligned(1)));

inline Pairs read_pairs(const int16_t *from) { return *reinterpret_cast<const AnyPairs *>(from); }
inline Pairs read_pairs(const int8_t *from) {
    return __builtin_convertvector(*reinterpret_cast<const AnyBytes *>(from), Pairs);
}

// sums + weights * x, both numbers of a pair.
inline Words add_pairs(Words sums, Pairs weights, Words x) {
#if defined(__AVX512VNNI__) && FULL_VECTORS
    return (Words)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)weights, (__m512i)x);
#elif defined(__AVX512BW__) && FULL_VECTORS
    return sums + (Words)_mm512_madd_epi16((__m512i)weights, (__m512i)x);
#elif defined(__AVXVNNI__) && FULL_VECTORS
    return (Words)_mm256_dpwssd_avx_epi32((__m256i)sums, (__m256i)weights, (__m256i)x);
#elif defined(__AVX2__) && !defined(__AVX512F__) && FULL_VECTORS
    return sums + (Words)_mm256_madd_epi16((__m256i)weights, (__m256i)x);
#else
    const Words both = (Words)weights;
    return sums + (both << 16 >> 16) * (x << 16 >> 16) + (both >> 16) * (x >> 16);
#endif
}

inline int64_t rounded_pairs(int64_t depth) { return (depth + 1) / 2; }

template <typename W>
inline int64_t groups_of(int64_t depth) {
    return (depth + GROUP<W> - 1) / GROUP<W>;
}

// What a whole number of some numbers is worth, and how many of it there are in 1: the largest of them is to be `most`. For
// numbers too small for that all are 0, and where one is not finite, `step` is not, so that no product is either.
struct Scale {
    float step, inverse;

    Scale(float largest, int most)
        : step(std::isfinite(largest) ? largest / most : NAN),
          inverse(std::isfinite(largest) && largest > 1e-33f ? most / largest : 0.0f) {}
};

// A matrix: the scales of its columns, then panels [pairs, WIDE, 2].
template <typename W>
struct Fixed {
    const float *scales;
    const W *weights;
    int64_t depth;

    Fixed(const void *packed, int64_t columns, int64_t deep)
        : scales(static_cast<const float *>(packed)), weights(reinterpret_cast<const W *>(scales + whole_panels(columns))),
          depth(deep) {}

    static int64_t size(int64_t columns, int64_t depth) {  // in bytes
        return whole_panels(columns) * int64_t(sizeof(float) + sizeof(W) * 2 * rounded_pairs(depth));
    }

    const W *panel(int64_t column, int64_t from) const {
        return weights + column * 2 * rounded_pairs(depth) + from * WIDE;
    }

    static void pack(Unpacked m, int64_t columns, int64_t depth, void *packed) {
        const Fixed to(packed, columns, depth);
        float *scales = const_cast<float *>(to.scales);
        std::memset(packed, 0, size(columns, depth));
        for (int64_t c = 0; c < columns; ++c) {
            float largest = 0.0f;
            for (int64_t d = 0; d < depth; ++d) largest = std::fmax(largest, std::fabs(m.at(d, c)));
            const Scale scale(largest, LARGEST<W>);
            scales[c] = scale.step;
            W *column = const_cast<W *>(to.panel(c / WIDE * WIDE, 0)) + c % WIDE * 2;
            for (int64_t d = 0; d < depth && scale.inverse > 0.0f; ++d)
                column[d / 2 * 2 * WIDE + d % 2] = static_cast<W>(std::lrint(m.at(d, c) * scale.inverse));
        }
    }
};

// Rows of states beside weights W.
struct States {
    std::vector<int16_t> numbers;  // [rows, depth], 0 behind an odd one
    std::vector<float> scales;     // [rows, groups]
    int64_t row = 0, groups = 0;

    template <typename W>
    void round(const float *x, int64_t x_row, int64_t rows, int64_t depth) {
        row = 2 * rounded_pairs(depth);
        groups = groups_of<W>(depth);
        numbers.resize(rows * row);
        scales.resize(rows * groups);
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t group = 0; group < groups; ++group) {
                const int64_t first = group * GROUP<W>, n = depth - first < GROUP<W> ? depth - first : GROUP<W>;
                const float *from = x + i * x_row + first;
                int16_t *to = numbers.data() + i * row + first;
                int32_t bits = 0;  // of the largest, sign apart: as whole numbers NaN is above them all
                for (int64_t j = 0; j < n; ++j) {
                    int32_t size;
                    std::memcpy(&size, from + j, sizeof(size));
                    size &= INT32_MAX;
                    bits = size > bits ? size : bits;
                }
                float largest;
                std::memcpy(&largest, &bits, sizeof(largest));
                const Scale scale(largest, LARGEST_STATE<W>);
                scales[i * groups + group] = scale.step;
                if (scale.inverse > 0.0f)
                    for (int64_t j = 0; j < n; ++j) {
                        const float number = from[j] * scale.inverse;
                        to[j] = static_cast<int16_t>(static_cast<int32_t>(number + (number < 0.0f ? -0.5f : 0.5f)));
                    }
                else
                    std::memset(to, 0, sizeof(*to) * n);
                if (n % 2) to[n] = 0;
            }
    }
};

constexpr int FEW = 2;           // rows that wait for weights rather than for sums
constexpr int64_t AHEAD = 2048;  // bytes before they are read, weights are asked for then

// Adds ROWS rows of one group, `row` and `scale_row` apart, times a part of a panel `pairs` deep.
template <int ROWS, typename W>
__attribute__((noinline)) void add_group(Lanes (*to)[2], const int16_t *x, int64_t row, const float *x_scales,
                                         int64_t scale_row, const W *weights, const float *scales, int64_t pairs) {
    Words sums[ROWS][2] = {};
    for (int64_t line = 0; ROWS == TALL && line < pairs; line += 16)
        for (int i = 0; i < ROWS; ++i) __builtin_prefetch(x + (ROWS + i) * row + 2 * line);  // of the next block
    for (int64_t d = 0; d < pairs; ++d, x += 2, weights += 2 * WIDE) {
        const Pairs left = read_pairs(weights), right = read_pairs(weights + WIDE);
        if (ROWS <= FEW) __builtin_prefetch(weights + AHEAD / sizeof(W));
        for (int i = 0; i < ROWS; ++i) {
            int32_t pair;
            std::memcpy(&pair, x + i * row, sizeof(pair));
            sums[i][0] = add_pairs(sums[i][0], left, Words{} + pair);
            sums[i][1] = add_pairs(sums[i][1], right, Words{} + pair);
        }
    }
    const Lanes left = read(scales), right = read(scales + LANES);
#pragma GCC unroll 12  // else sums would be written to memory all the while
    for (int i = 0; i < ROWS; ++i) {
        const float scale = x_scales[i * scale_row];
        to[i][0] += __builtin_convertvector(sums[i][0], Lanes) * (left * scale);
        to[i][1] += __builtin_convertvector(sums[i][1], Lanes) * (right * scale);
    }
}

// For `multiply`.
template <typename W>
struct FixedProduct {
    const States &x;
    const Fixed<W> w;
    int16_t *const wide;  // where a part of a panel of bytes is widened once for all rows that pass; null: for each
    const int64_t depth = w.depth;
    static constexpr int64_t grain = GROUP<W>, deepest = 2 * DEEPEST > grain ? 2 * DEEPEST / grain * grain : grain;

    void begin(int64_t column, int64_t from, int64_t deep) const {
        const W *panel = w.panel(column, from);
        for (int64_t i = 0; wide && i < 2 * rounded_pairs(deep) * WIDE; ++i) wide[i] = panel[i];
    }

    template <int ROWS>
    void add(Block<ROWS> &block, int64_t row, int64_t column, int64_t from, int64_t deep) const {
        for (int64_t first = from; first < from + deep; first += grain) {
            const int64_t n = from + deep - first < grain ? from + deep - first : grain;
            const auto add = [&](auto weights) {
                block.of_rows([&](auto rows) {
                    add_group<decltype(rows)::value>(block.sums, x.numbers.data() + row * x.row + first, x.row,
                                                     x.scales.data() + row * x.groups + first / grain, x.groups, weights,
                                                     w.scales + column, rounded_pairs(n));
                });
            };
            wide ? add(static_cast<const int16_t *>(wide) + (first - from) * WIDE) : add(w.panel(column, first));
        }
    }
};

// A matrix in panels of fp32 (32 bits), or in fixed point (16 or 8).
struct Matrix {
    const void *panels;
    int64_t bits, depth, columns;

    const float *floats() const { return static_cast<const float *>(panels); }
};

// work(W) for weights of so many bits.
template <typename Work>
inline auto of_bits(int64_t bits, Work work) {
    return bits == 8 ? work(int8_t{}) : work(int16_t{});
}

inline int64_t matrix_size(int64_t columns, int64_t depth, int64_t bits) {  // in bytes
    if (bits == 32) return int64_t(sizeof(float)) * panels_size(columns, depth);
    return of_bits(bits, [&](auto w) { return Fixed<decltype(w)>::size(columns, depth); });
}

// Rows [.., depth] as products with matrices of some bits take them.
struct Rows {
    const float *x;
    int64_t row;
    States fixed;

    void take(const float *from, int64_t from_row, int64_t rows, int64_t depth, int64_t bits) {
        x = from;
        row = from_row;
        if (bits != 32) of_bits(bits, [&](auto w) { fixed.round<decltype(w)>(x, row, rows, depth); });
    }
};

// As `multiply` of a product.
template <typename Which, typename Then>
inline void multiply(const Rows &x, const Matrix &m, float *y, int64_t y_row, int64_t rows, int64_t stretches,
                     Which stretch, Then then) {
    if (m.bits == 32) {
        const FloatProduct product{x.x, x.row, m.floats(), m.depth};
        return multiply(product, m.columns, y, y_row, rows, stretches, stretch, then);
    }
    of_bits(m.bits, [&](auto w) {
        alignas(64) static thread_local int16_t room[FixedProduct<int8_t>::deepest * WIDE];
        int16_t *wide = sizeof(w) == 1 && rows > TALL ? room : nullptr;
        const FixedProduct<decltype(w)> product{x.fixed, {m.panels, m.columns, m.depth}, wide};
        multiply(product, m.columns, y, y_row, rows, stretches, stretch, then);
    });
}

// The same for rows 0 to `rows`.
inline void multiply(const Rows &x, const Matrix &m, float *y, int64_t y_row, int64_t rows) {
    if (rows == 1 && m.bits == 32) return multiply_row(x.x, m.floats(), m.depth, m.columns, y);
    multiply(x, m, y, y_row, rows, 1, [&](int64_t) { return Stretch{0, rows}; }, [](auto &, int64_t, int64_t, int64_t) {});
}

// x [rows, depth] times a matrix.
inline void multiply(const float *x, const Matrix &m, float *y, int64_t rows) {
    static thread_local Rows room;  // new memory would have to be cleared by the system
    room.take(x, m.depth, rows, m.depth, m.bits);
    multiply(room, m, y, m.columns, rows);
}

// Adds x [rows, depth] times a matrix that is not deep to rows of y: row(i) is where the i-th lies.
template <typename Row>
inline void add_multiplied(const Rows &x, const Matrix &m, int64_t rows, Row row) {
    const auto add = [&](const auto &product) {
        for (int64_t column = 0; column < m.columns; column += WIDE) {
            const int64_t real = m.columns - column < WIDE ? m.columns - column : WIDE;
            by_blocks(rows, 0, [&](auto &block, int64_t first) {
                const auto to = [&](int i) { return row(first + i) + column; };
                block.take(to, real);
                product.add(block, first, column, 0, m.depth);
                block.give(to, real);
            });
        }
    };
    if (m.bits == 32) return add(FloatProduct{x.x, x.row, m.floats(), m.depth});
    of_bits(m.bits, [&](auto w) {
        add(FixedProduct<decltype(w)>{x.fixed, {m.panels, m.columns, m.depth}, nullptr});
    });
}

inline void pack_matrix(const Unpacked &from, int64_t columns, int64_t depth, int64_t bits, void *to) {
    if (bits == 32) return pack(from, columns, depth, static_cast<float *>(to));
    of_bits(bits, [&](auto w) { Fixed<decltype(w)>::pack(from, columns, depth, to); });
}

}  // namespace

extern "C" {

int64_t tunesmith_matrix_size(int64_t columns, int64_t depth, int64_t bits) { return matrix_size(columns, depth, bits); }

// A weight [outputs, inputs], times `gain` [inputs] where given, for products inputs -> outputs, or back.
void tunesmith_pack_matrix(const float *weight, int64_t outputs, int64_t inputs, const float *gain, bool back,
                           int64_t bits, void *to) {
    const int64_t columns = back ? inputs : outputs, depth = back ? outputs : inputs;
    const Unpacked from = back ? Unpacked{weight, inputs, 1, nullptr, gain} : Unpacked{weight, 1, inputs, gain};
    pack_matrix(from, columns, depth, bits, to);
}

// y [rows, columns] = x [rows, depth] times a matrix.
void tunesmith_multiply(const float *x, const void *matrix, int64_t bits, int64_t depth, int64_t columns, int64_t rows,
                        float *y) {
    multiply(x, Matrix{matrix, bits, depth, columns}, y, rows);
}

}  // extern "C"

// Blocks of 32 x 32 in the shapes in which a processor with products of bf16 multiplies them, and what is done to vectors
// between products. For training/step.cpp and engine/tiles.cpp.

#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>

#include "sums.h"

namespace {

constexpr int64_t DEEPEST = 12;  // blocks of weights, 24 KiB, that are multiplied with all tokens in turn

inline int64_t rounded_up(int64_t n) { return (n + SIDE - 1) / SIDE * SIDE; }
inline int64_t packed_size(int64_t depth, int64_t wide) { return rounded_up(depth) * rounded_up(wide); }

// ---- layouts ---------------------------------------------------------------------------------------------------------

// A matrix [rows, columns] of bf16 as panels of 32 columns, one after another: its blocks lie in one piece.
struct Panels {
    bf16 *data;
    int64_t rows;

    bf16 *block(int64_t panel, int64_t row) const { return data + (panel * rows + row) * SIDE; }
    Panels from(int64_t row) const { return {data + row * SIDE, rows}; }
    Panels panels(int64_t first) const { return {block(first, 0), rows}; }
    int64_t step() const { return rows * SIDE; }  // from a block to that beside it
};

inline __m512 load_low(const bf16 *from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from))), 16));
}
inline __m512bh load_32(const bf16 *from) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(from)); }
inline __m512i both(__m512 low, __m512 high) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)); }
inline void store_16(bf16 *to, __m512 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}
inline void store_32(bf16 *to, __m512 low, __m512 high) { _mm512_storeu_si512(to, both(low, high)); }
inline __mmask16 first_of_16(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }

inline void transpose(__m512i r[16]) {  // 16 x 16 words of 32 bits
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
        }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; ++j) {
            t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + 4 + j], 0x88);
            t[i + 4 + j] = _mm512_shuffle_i32x4(r[i + j], r[i + 4 + j], 0xdd);
        }
    for (int j = 0; j < 8; ++j) {
        r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
        r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
    }
}

// Two rows, 32 wide, as a row of pairs of either tile.
inline void interleave(__m512i first, __m512i second, bf16 *left, bf16 *right) {
    alignas(64) static constexpr uint16_t LOW[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                     8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    __m512i low = _mm512_load_si512(LOW), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    _mm512_storeu_si512(left, _mm512_permutex2var_epi16(first, low, second));
    _mm512_storeu_si512(right, _mm512_permutex2var_epi16(first, high, second));
}

// A packed block (32 deep, 32 wide: two tiles) of a block in memory whose rows are its depth; `deep` of them are real.
inline void pack_rows(const bf16 *from, int64_t deep, bf16 *to) {
    const __m512i zero = _mm512_setzero_si512();
    for (int64_t i = 0; i < 16; ++i, from += 2 * SIDE) {
        __m512i first = 2 * i < deep ? _mm512_loadu_si512(from) : zero;
        __m512i second = 2 * i + 1 < deep ? _mm512_loadu_si512(from + SIDE) : zero;
        interleave(first, second, to + i * SIDE, to + BLOCK / 2 + i * SIDE);
    }
}

// The same at a third of the instructions, columns in another order: `ordered` and `column_of` bring them back.
inline void pack_rows_mixed(const bf16 *from, bf16 *to) {
    for (int64_t i = 0; i < 16; ++i, from += 2 * SIDE) {
        const __m512i first = _mm512_loadu_si512(from), second = _mm512_loadu_si512(from + SIDE);
        _mm512_storeu_si512(to + i * SIDE, _mm512_unpacklo_epi16(first, second));
        _mm512_storeu_si512(to + BLOCK / 2 + i * SIDE, _mm512_unpackhi_epi16(first, second));
    }
}

// Column `at` of what was mixed.
inline int64_t column_of(int64_t at) { return at % 16 / 4 * 8 + at / 16 * 4 + at % 4; }

// 32 floats that were mixed, half `high` of them in order.
inline __m512 ordered(const float *mixed, bool high) {
    const __m512i low_half = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i places = high ? _mm512_add_epi64(low_half, _mm512_set1_epi64(4)) : low_half;
    return _mm512_castpd_ps(_mm512_permutex2var_pd(_mm512_castps_pd(_mm512_load_ps(mixed)), places,
                                                   _mm512_castps_pd(_mm512_load_ps(mixed + 16))));
}

// The same of one whose rows are its columns; `wide` of them are real.
inline void pack_columns(const bf16 *from, int64_t wide, bf16 *to) {
    for (int64_t half = 0; half < SIDE; half += 16, to += BLOCK / 2) {
        __m512i rows[16];
        for (int64_t i = 0; i < 16; ++i)
            rows[i] = half + i < wide ? _mm512_loadu_si512(from + (half + i) * SIDE) : _mm512_setzero_si512();
        transpose(rows);
        for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * SIDE, rows[i]);
    }
}

// 32 floats of a row, of which `real` are there, times `gain` and `scale`.
inline __m512i halves(const float *from, int64_t real, const float *gain, float scale) {
    __m512 part[2];
    for (int64_t half = 0; half < 2; ++half, real -= 16) {
        const __mmask16 there = first_of_16(real);
        part[half] = _mm512_mul_ps(_mm512_maskz_loadu_ps(there, from + 16 * half), _mm512_set1_ps(scale));
        if (gain) part[half] = _mm512_mul_ps(part[half], _mm512_maskz_loadu_ps(there, gain + 16 * half));
    }
    return both(part[0], part[1]);
}

// Packs a matrix [rows, columns] of fp32, times `gain` [columns] and `scale`, for products columns -> rows ...
void pack_forward(const float *from, int64_t rows, int64_t columns, const float *gain, float scale, bf16 *to) {
    for (int64_t o = 0; o < rows; o += SIDE)
        for (int64_t i = 0; i < columns; i += SIDE)
            for (int64_t half = o; half < o + SIDE; half += 16, to += BLOCK / 2) {
                __m512i words[16];
                for (int64_t j = 0; j < 16; ++j)
                    words[j] = half + j < rows
                                   ? halves(from + (half + j) * columns + i, columns - i, gain ? gain + i : gain, scale)
                                   : _mm512_setzero_si512();
                transpose(words);
                for (int64_t j = 0; j < 16; ++j) _mm512_storeu_si512(to + j * SIDE, words[j]);
            }
}

// ... and for products rows -> columns. Its panels lie `stride` apart.
void pack_backward(const float *from, int64_t rows, int64_t columns, const float *gain, float scale, bf16 *to,
                   int64_t stride) {
    for (int64_t i = 0; i < columns; i += SIDE, to += stride)
        for (int64_t o = 0; o < rows; o += SIDE)
            for (int64_t j = 0; j < 16; ++j) {
                __m512i pair[2];
                for (int64_t k = 0; k < 2; ++k) {
                    const int64_t row = o + 2 * j + k;
                    pair[k] = row < rows ? halves(from + row * columns + i, columns - i, gain ? gain + i : gain, scale)
                                         : _mm512_setzero_si512();
                }
                bf16 *left = to + o * SIDE + j * SIDE;
                interleave(pair[0], pair[1], left, left + BLOCK / 2);
            }
}

// ---- products ---------------------------------------------------------------------------------------------------------

// A block of sums as a block of bf16.
inline void round_block(const float *c, bf16 *to) {
    for (int64_t i = 0; i < BLOCK; i += SIDE) store_32(to + i, _mm512_load_ps(c + i), _mm512_load_ps(c + i + 16));
}

// Rows `top` to `top` + 16 and columns `left` to `left` + 16 of a block, exchanged.
inline void turned_quarter(const float *c, int64_t top, int64_t left, __m512i words[16]) {
    for (int64_t i = 0; i < 16; ++i) words[i] = _mm512_load_si512(c + (top + i) * SIDE + left);
    transpose(words);
}

// The first `wide` columns of a block of sums, whole sixteens, as rows.
inline void round_turned(const float *c, int64_t wide, bf16 *to) {
    for (int64_t left = 0; left < SIDE && left < wide; left += 16) {
        __m512i low[16], high[16];
        turned_quarter(c, 0, left, low);
        turned_quarter(c, 16, left, high);
        for (int64_t i = 0; i < 16; ++i)
            store_32(to + (left + i) * SIDE, _mm512_castsi512_ps(low[i]), _mm512_castsi512_ps(high[i]));
    }
}

// A panel of frozen weights with each block of 32 tokens, a part of its depth at a time that stays in the cache next
// to the core; then(panel, token) adds what factors give, and takes the sums.
// `partial` [tokens, 32] is room for sums under way.
template <typename Then>
inline void by_panels(Panels in, const bf16 *weight, int64_t steps, int64_t panels, int64_t tokens, float *partial,
                      Then then) {
    const int64_t blocks = tokens / SIDE, lines = (SIDE + blocks - 1) / blocks;
    const int64_t parts = (steps + DEEPEST - 1) / DEEPEST, size = (steps + parts - 1) / parts;
    for (int64_t panel = 0; panel < panels; ++panel, weight += steps * BLOCK)
        for (int64_t first = 0; first < steps; first += size) {
            const int64_t deep_now = steps - first < size ? steps - first : size;
            for (int64_t at = 0; at < tokens; at += SIDE) {
                const bf16 *part = weight + first * BLOCK, *next = part + steps * BLOCK;
                if (first)
                    give_sums(partial + at * SIDE);
                else
                    clear();
                accumulate(in.block(first, at), in.step(), part, deep_now,
                           next + at / SIDE * lines * deep_now * SIDE, panel + 1 < panels ? lines : 0);
                if (first + deep_now < steps)
                    take_sums(partial + at * SIDE);
                else
                    then(panel, at);
            }
        }
}

// The same where then(panel, token) adds what factors give and leaves the sums in the tiles, and write(panel, token, i,
// sums) puts row i of a block where it belongs: that is done between the tile instructions of the next block. Panels are
// walked in the order that place(0), place(1), ... says. They lie `apart` blocks from each other, or without a gap.
template <typename Place, typename Then, typename Write>
inline void by_panels_written(Panels in, const bf16 *weight, int64_t steps, int64_t panels, int64_t tokens,
                              float *partial, Place place, Then then, Write write, int64_t apart = 0) {
    const int64_t blocks = tokens / SIDE, lines = (SIDE + blocks - 1) / blocks;
    const int64_t parts = (steps + DEEPEST - 1) / DEEPEST, size = (steps + parts - 1) / parts;
    const int64_t panel_size = (apart ? apart : steps) * BLOCK;
    alignas(64) float sums[2][BLOCK];
    int64_t now = 0, before = 0, before_at = 0, written = SIDE;
    for (int64_t walked = 0; walked < panels; ++walked) {
        const int64_t panel = place(walked), next_panel = walked + 1 < panels ? place(walked + 1) : panel;
        for (int64_t first = 0; first < steps; first += size) {
            const int64_t deep_now = steps - first < size ? steps - first : size;
            const int64_t a_step = (SIDE + deep_now - 1) / deep_now;
            const bf16 *next = weight + next_panel * panel_size + first * BLOCK;
            for (int64_t at = 0; at < tokens; at += SIDE) {
                if (first)
                    give_sums(partial + at * SIDE);
                else
                    clear();
                accumulate(in.block(first, at), in.step(), weight + panel * panel_size + first * BLOCK, deep_now,
                           next + at / SIDE * lines * deep_now * SIDE, walked + 1 < panels ? lines : 0, [&](int64_t) {
                               for (int64_t i = 0; i < a_step && written < SIDE; ++i, ++written)
                                   write(before, before_at, written, sums[now] + written * SIDE);
                           });
                if (first + deep_now < steps) {
                    take_sums(partial + at * SIDE);
                    continue;
                }
                then(panel, at);
                now ^= 1;
                take_sums(sums[now]);
                before = panel, before_at = at, written = 0;
            }
        }
    }
    for (; written < SIDE; ++written) write(before, before_at, written, sums[now] + written * SIDE);
}

// ---- functions -------------------------------------------------------------------------------------------------------

// e^x to 1e-7 relative, and to half the spacing of numbers at x beside that: 6e-6 at 88. 0 below -103, NaN stays NaN.
inline __m512 exponential(__m512 x) {
    const __m512 power = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));  // of two
    const __m512 beyond_whole = _mm512_reduce_ps(power, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 p = _mm512_set1_ps(1.8671301e-3f);
    for (float term : {9.0170298e-3f, 5.5799913e-2f, 2.4016444e-1f, 6.9315130e-1f, 1.0f})
        p = _mm512_fmadd_ps(p, beyond_whole, _mm512_set1_ps(term));
    return _mm512_scalef_ps(p, power);
}

inline __m512 sigmoid(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 below = _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x)));
    const __m512 guess = _mm512_rcp14_ps(below);  // and a step of Newton's; where it is 1 / inf, 0 as it is
    const __m512 better = _mm512_mul_ps(guess, _mm512_fnmadd_ps(below, guess, _mm512_set1_ps(2.0f)));
    return _mm512_mask_mov_ps(better, _mm512_cmp_ps_mask(below, _mm512_set1_ps(1e38f), _CMP_GT_OQ), guess);
}

inline float sum(__m512 x) { return _mm512_reduce_add_ps(x); }

// e^(score - largest) of the `seen` scores that a query may see, zeros behind; returns one over their sum. Scores and
// weights are those of one query in blocks.
inline float weigh(const float *score, bf16 *to, int64_t seen) {
    const __m512 lowest = _mm512_set1_ps(-__builtin_huge_valf());
    __m512 most = lowest, total = _mm512_setzero_ps();
    for (int64_t at = 0; at < seen; at += 16) {
        const float *from = score + at / SIDE * BLOCK + at % SIDE;
        most = _mm512_max_ps(most, _mm512_mask_loadu_ps(lowest, first_of_16(seen - at), from));
    }
    const float largest = _mm512_reduce_max_ps(most);
    for (int64_t at = 0; at < seen; at += SIDE) {
        __m512 part[2];
        for (int64_t half = 0; half < 2; ++half) {
            const __m512 value = _mm512_loadu_ps(score + at / SIDE * BLOCK + 16 * half);
            part[half] = _mm512_maskz_mov_ps(first_of_16(seen - at - 16 * half),
                                             exponential(_mm512_sub_ps(value, _mm512_set1_ps(largest))));
            total = _mm512_add_ps(total, part[half]);
        }
        store_32(to + at / SIDE * BLOCK, part[0], part[1]);
    }
    return 1.0f / sum(total);
}

}  // namespace

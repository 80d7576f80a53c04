// The sums of a block of 32 x 32 of a product: in tiles 0 to 3 where the processor has them (AMX), else in the cache next
// to the core, and eight rows at a time in registers while they are added to.
//
// Of an operand `a` 32 rows lie one after another, 64 bytes each: 32 numbers of bf16, or 64 of 8 bits, of the depth. Of an
// operand `b` 16 columns are a tile: 16 rows of 64 bytes, in each two numbers (of 8 bits: four) of the depth by column.

#pragma once

#include <immintrin.h>

#include <cstring>
#include <utility>

#include "bf16.h"

namespace {

constexpr int64_t SIDE = 32;            // rows and columns of a block of a product: two tiles each way
constexpr int64_t BLOCK = SIDE * SIDE;  // elements of a block of an operand
constexpr int64_t DEEP = 64;            // numbers of 8 bits in a row of a tile, and its bytes
constexpr int64_t TILE_BYTES = 16 * DEEP;

struct Nothing {
    void operator()(int64_t) const {}
};

#if defined(__AMX_BF16__) && defined(__AMX_INT8__)

// Tile instructions read memory behind the compiler's back.
inline void settle() { __asm__ volatile("" ::: "memory"); }

// While it lives its thread multiplies.
struct Products {
    Products() {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int i = 0; i < 8; ++i) config.bytes[i] = DEEP, config.rows[i] = 16;
        settle();
        _tile_loadconfig(&config);
    }
    Products(const Products &) = delete;
    ~Products() { _tile_release(); }
};

inline void clear() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// Adds 32 rows of `a`, `steps` blocks that lie `stride` apart, times packed blocks `b`. Meanwhile `lines` cache lines a
// step are asked for from `next` on, and meanwhile(step) is called: what it does costs little beside a product. Without
// BOTTOM or RIGHT that half of the sums is left as it is: what is known to be nothing need not be multiplied.
template <bool BOTTOM = true, bool RIGHT = true, typename Meanwhile = Nothing>
inline void accumulate(const bf16 *a, int64_t stride, const bf16 *b, int64_t steps, const bf16 *next = nullptr,
                       int64_t lines = 0, Meanwhile meanwhile = {}) {
    settle();
    for (int64_t s = 0; s < steps; ++s, a += stride, b += BLOCK) {
        _tile_loadd(4, a, DEEP);
        _tile_loadd(6, b, DEEP);
        _tile_dpbf16ps(0, 4, 6);
        if (RIGHT) {
            _tile_loadd(7, b + BLOCK / 2, DEEP);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (BOTTOM) {
            _tile_loadd(5, a + BLOCK / 2, DEEP);
            _tile_dpbf16ps(2, 5, 6);
            if (RIGHT) _tile_dpbf16ps(3, 5, 7);
        }
        for (int64_t i = 0; i < lines; ++i, next += SIDE) _mm_prefetch(next, _MM_HINT_T1);
        meanwhile(s);
    }
}

// Adds products of 8 bits, whose sums are whole numbers: `a` has signs, and the tiles `left` and `right` have none.
inline void accumulate_eight(const int8_t *a, int64_t stride, const uint8_t *left, const uint8_t *right, int64_t steps,
                             const uint8_t *next, int64_t lines) {
    settle();
    for (int64_t s = 0; s < steps; ++s, a += stride, left += TILE_BYTES, right += TILE_BYTES) {
        _tile_loadd(4, a, DEEP);
        _tile_loadd(6, left, DEEP);
        _tile_dpbsud(0, 4, 6);
        _tile_loadd(7, right, DEEP);
        _tile_dpbsud(1, 4, 7);
        _tile_loadd(5, a + TILE_BYTES, DEEP);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
        for (int64_t i = 0; i < lines; ++i, next += DEEP) _mm_prefetch(next, _MM_HINT_T1);
    }
}

template <bool BOTTOM = true>
inline void take_sums(float *c) {  // [32, 32]
    _tile_stored(0, c, 128);
    _tile_stored(1, c + 16, 128);
    if (BOTTOM) {
        _tile_stored(2, c + BLOCK / 2, 128);
        _tile_stored(3, c + BLOCK / 2 + 16, 128);
    }
    settle();
}

inline void give_sums(const float *c) {
    settle();
    _tile_loadd(0, c, 128);
    _tile_loadd(1, c + 16, 128);
    _tile_loadd(2, c + BLOCK / 2, 128);
    _tile_loadd(3, c + BLOCK / 2 + 16, 128);
}

#else

// One pointer to a thread is found without a call, a block of its own is not.
[[gnu::tls_model("initial-exec")]] thread_local float *block_sums = nullptr;

// While it lives its thread multiplies.
struct Products {
    alignas(64) float sums[BLOCK];

    Products() { block_sums = sums; }
    Products(const Products &) = delete;
    ~Products() { block_sums = nullptr; }
};

inline void clear() {
    for (int64_t i = 0; i < BLOCK; i += 16) _mm512_store_ps(block_sums + i, _mm512_setzero_ps());
}

struct OfBf16 {
    using Sums = __m512;
    static Sums add(Sums sums, __m512i a, __m512i b) {
        return _mm512_dpbf16_ps(sums, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
    }
};

struct OfEight {
    using Sums = __m512i;
    static Sums add(Sums sums, __m512i a, __m512i b) { return _mm512_dpbusd_epi32(sums, b, a); }
};

inline __m512i repeated(const uint8_t *word) {
    int32_t value;
    std::memcpy(&value, word, sizeof(value));
    return _mm512_set1_epi32(value);
}

// Adds rows of `a`, one for each I, times COLUMNS tiles: of either operand the bytes from one step to the next. Sixteen
// sums are in registers: as many as two units that take some cycles for each keep busy. While a step is multiplied every
// fourth of its `lines` cache lines is asked for from `next` on. Folds, not loops: only then are sums never in memory.
template <typename Of, int COLUMNS, int... I>
inline void add_rows(std::integer_sequence<int, I...>, const uint8_t *a, int64_t a_step, const uint8_t *left,
                     const uint8_t *right, int64_t b_step, int64_t steps, float *c, const uint8_t *next, int64_t lines) {
    using Sums = typename Of::Sums;
    const auto at = [c](int row, int column) { return reinterpret_cast<Sums *>(c + row * SIDE + 16 * column); };
    Sums first[] = {*at(I, 0)...}, second[] = {*at(I, COLUMNS - 1)...};
    for (int64_t s = 0; s < steps; ++s, a += a_step, left += b_step, right += b_step, next += lines * DEEP) {
        for (int64_t i = 0; i < lines; i += 4) _mm_prefetch(next + i * DEEP, _MM_HINT_T1);
        const uint8_t *row = a;
        for (int64_t k = 0; k < TILE_BYTES; k += DEEP, row += 4) {
            const __m512i one = _mm512_loadu_si512(left + k), other = _mm512_loadu_si512(right + k);
            const auto add = [&](int i) {
                const __m512i word = repeated(row + i * DEEP);
                first[i] = Of::add(first[i], word, one);
                if (COLUMNS == 2) second[i] = Of::add(second[i], word, other);
            };
            (add(I), ...);
        }
    }
    ((*at(I, 0) = first[I]), ...);
    if (COLUMNS == 2) ((*at(I, 1) = second[I]), ...);
}

template <typename Of, bool BOTTOM, bool RIGHT>
inline void add_block(const void *a, int64_t a_step, const void *left, const void *right, int64_t b_step, int64_t steps,
                      const void *next, int64_t lines) {
    constexpr int ROWS = RIGHT ? 8 : 16, COLUMNS = RIGHT ? 2 : 1;
    const uint8_t *rows = static_cast<const uint8_t *>(a), *ask = static_cast<const uint8_t *>(next);
    float *const c = block_sums;
    for (int64_t i = 0; i < (BOTTOM ? SIDE : SIDE / 2); i += ROWS)
        add_rows<Of, COLUMNS>(std::make_integer_sequence<int, ROWS>(), rows + i * DEEP, a_step,
                              static_cast<const uint8_t *>(left), static_cast<const uint8_t *>(right), b_step, steps,
                              c + i * SIDE, ask + i / ROWS * DEEP, lines);
}

template <bool BOTTOM = true, bool RIGHT = true, typename Meanwhile = Nothing>
inline void accumulate(const bf16 *a, int64_t stride, const bf16 *b, int64_t steps, const bf16 *next = nullptr,
                       int64_t lines = 0, Meanwhile meanwhile = {}) {
    add_block<OfBf16, BOTTOM, RIGHT>(a, 2 * stride, b, b + BLOCK / 2, 2 * BLOCK, steps, next, lines);
    for (int64_t s = 0; s < steps; ++s) meanwhile(s);
}

inline void accumulate_eight(const int8_t *a, int64_t stride, const uint8_t *left, const uint8_t *right, int64_t steps,
                             const uint8_t *next, int64_t lines) {
    add_block<OfEight, true, true>(a, stride, left, right, TILE_BYTES, steps, next, lines);
}

template <bool BOTTOM = true>
inline void take_sums(float *c) {
    for (int64_t i = 0; i < (BOTTOM ? BLOCK : BLOCK / 2); i += 16) _mm512_store_ps(c + i, _mm512_load_ps(block_sums + i));
}

inline void give_sums(const float *c) {
    for (int64_t i = 0; i < BLOCK; i += 16) _mm512_store_ps(block_sums + i, _mm512_load_ps(c + i));
}

#endif

// `accumulate` where it is known while it runs which halves of the sums are nothing.
inline void accumulate_part(bool bottom, bool right, const bf16 *a, int64_t stride, const bf16 *b, int64_t steps) {
    if (bottom)
        right ? accumulate(a, stride, b, steps) : accumulate<true, false>(a, stride, b, steps);
    else
        right ? accumulate<false, true>(a, stride, b, steps) : accumulate<false, false>(a, stride, b, steps);
}

}  // namespace

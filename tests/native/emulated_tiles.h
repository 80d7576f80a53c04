// The instructions that code for tiles of bf16 uses (AMX, AVX-512), as plain C++: what they are to compute can be tested
// on any x86-64 processor, how fast they do it cannot. Included before a source (-include), in place of the real ones.
//
// As in the manuals: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2. Only what sources use is here:
// an instruction that is missing fails to compile where the processor lacks it.

#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulated {

template <typename T>
struct Of {  // 64 bytes, element by element
    static constexpr int N = 64 / sizeof(T);
    T at[N];

    T &operator[](int i) { return at[i]; }
    T operator[](int i) const { return at[i]; }
};

template <typename T, typename V>
inline Of<T> as(V x) {
    static_assert(sizeof(x) == 64);
    Of<T> of;
    std::memcpy(&of, &x, 64);
    return of;
}

template <typename V, typename T>
inline V from(Of<T> of) {
    V x;
    std::memcpy(&x, &of, 64);
    return x;
}

template <typename V>
inline V read(const void *at) {
    V x;
    std::memcpy(&x, at, 64);
    return x;
}

template <typename V, typename T, typename Make>
inline V each(Make make) {
    Of<T> of;
    for (int i = 0; i < Of<T>::N; ++i) of[i] = make(i);
    return from<V>(of);
}

template <typename Make>
inline __m512 floats(Make make) {
    return each<__m512, float>(make);
}

template <typename Make>
inline __m512i words(Make make) {
    return each<__m512i, int32_t>(make);
}

// A result that the compiler takes as it is: real instructions are not put in another order either.
inline __m256 fixed(__m256 x) {
    __asm__("" : "+x"(x));
    return x;
}

inline __m512 fixed(__m512 x) {
    __m256 half[2];
    std::memcpy(half, &x, 64);
    for (__m256 &each : half) each = fixed(each);
    std::memcpy(&x, half, 64);
    return x;
}

// a b + c, rounded once.
inline __m512 fused(__m512 a, __m512 b, __m512 c) {
    __m256 x[2], y[2], z[2];
    std::memcpy(x, &a, 64);
    std::memcpy(y, &b, 64);
    std::memcpy(z, &c, 64);
    for (int i = 0; i < 2; ++i) z[i] = _mm256_fmadd_ps(x[i], y[i], z[i]);
    std::memcpy(&c, z, 64);
    return fixed(c);
}

inline float widened(uint16_t bits) {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}

// To the nearest, ties to even; what is too small to be normal becomes 0, and what is no number stays none.
inline uint16_t narrowed(float value) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    if ((word & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(word >> 16 | 0x40);
    if ((word & 0x7f800000) == 0) return static_cast<uint16_t>(word >> 16 & 0x8000);
    return static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

inline bool in(__mmask16 mask, int i) { return mask >> i & 1; }

// Numbers too small to be normal are 0 in products of bf16, whatever the mode is.
struct Flushing {
    const unsigned before = _mm_getcsr();
    Flushing() { _mm_setcsr(before | 0x8040); }
    ~Flushing() { _mm_setcsr(before); }
};

// ---- tiles: 16 rows of 64 bytes --------------------------------------------------------------------------------------

struct Tile {
    alignas(64) uint8_t row[16][64];
};

inline thread_local bool configured = false;

inline Tile &tile(int index) {
    static thread_local Tile tiles[8];
    if (!configured) __builtin_trap();
    return tiles[index];
}

inline void tile_loadconfig(const void *) { configured = true; }
inline void tile_release() { configured = false; }

inline void tile_zero(int to) { std::memset(&tile(to), 0, sizeof(Tile)); }

inline void tile_loadd(int to, const void *from, int64_t stride) {
    for (int i = 0; i < 16; ++i) std::memcpy(tile(to).row[i], static_cast<const uint8_t *>(from) + i * stride, 64);
}

inline void tile_stored(int from, void *to, int64_t stride) {
    for (int i = 0; i < 16; ++i) std::memcpy(static_cast<uint8_t *>(to) + i * stride, tile(from).row[i], 64);
}

// Rows of pairs of bf16 times pairs of rows: even and odd ones are added up apart, and then both to what was there.
inline void tile_dpbf16ps(int to, int left, int right) {
    const Flushing flushing;
    __m256 even[16][2], odd[16][2];  // of the right one, as floats
    for (int k = 0; k < 16; ++k)
        for (int half = 0; half < 2; ++half) {
            const auto pairs = _mm256_load_si256(reinterpret_cast<const __m256i *>(tile(right).row[k]) + half);
            even[k][half] = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
            odd[k][half] = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(~0xffff)));
        }
    for (int i = 0; i < 16; ++i) {
        const Of<uint16_t> a = read<Of<uint16_t>>(tile(left).row[i]);
        __m256 of_even[2] = {}, of_odd[2] = {};
        for (int k = 0; k < 16; ++k)
            for (int half = 0; half < 2; ++half) {
                of_even[half] = _mm256_fmadd_ps(_mm256_set1_ps(widened(a[2 * k])), even[k][half], of_even[half]);
                of_odd[half] = _mm256_fmadd_ps(_mm256_set1_ps(widened(a[2 * k + 1])), odd[k][half], of_odd[half]);
            }
        for (int half = 0; half < 2; ++half) {
            float *at = reinterpret_cast<float *>(tile(to).row[i]) + 8 * half;
            const __m256 both = fixed(_mm256_add_ps(fixed(of_even[half]), fixed(of_odd[half])));
            _mm256_store_ps(at, fixed(_mm256_add_ps(_mm256_load_ps(at), both)));
        }
    }
}

// Rows of fours of bytes with signs times fours of rows without.
inline void tile_dpbsud(int to, int left, int right) {
    for (int i = 0; i < 16; ++i) {
        Of<int32_t> sums = read<Of<int32_t>>(tile(to).row[i]);
        const int8_t *a = reinterpret_cast<const int8_t *>(tile(left).row[i]);
        for (int k = 0; k < 16; ++k)
            for (int j = 0; j < 16; ++j)
                for (int byte = 0; byte < 4; ++byte) sums[j] += a[4 * k + byte] * tile(right).row[k][4 * j + byte];
        std::memcpy(tile(to).row[i], &sums, 64);
    }
}

// ---- vectors ---------------------------------------------------------------------------------------------------------

inline __m512 setzero_ps() { return __m512{}; }
inline __m512i setzero_si512() { return __m512i{}; }
inline __m512 set1_ps(float x) { return floats([=](int) { return x; }); }
inline __m512i set1_epi16(int16_t x) { return each<__m512i, int16_t>([=](int) { return x; }); }
inline __m512i set1_epi32(int32_t x) { return words([=](int) { return x; }); }
inline __m512i set1_epi64(int64_t x) { return each<__m512i, int64_t>([=](int) { return x; }); }
template <typename... T>
inline __m512i setr_epi32(T... x) { return from<__m512i>(Of<int32_t>{{x...}}); }
template <typename... T>
inline __m512i setr_epi64(T... x) { return from<__m512i>(Of<int64_t>{{x...}}); }

inline __m512 loadu_ps(const void *at) { return read<__m512>(at); }
inline __m512i loadu_si512(const void *at) { return read<__m512i>(at); }
inline void storeu_ps(void *to, __m512 x) { std::memcpy(to, &x, 64); }
inline void storeu_si512(void *to, __m512i x) { std::memcpy(to, &x, 64); }

template <typename Address>
inline Address aligned(Address at) {  // else the real ones fault
    if (reinterpret_cast<uintptr_t>(at) % 64) __builtin_trap();
    return at;
}
inline __m512 load_ps(const void *at) { return loadu_ps(aligned(at)); }
inline __m512i load_si512(const void *at) { return loadu_si512(aligned(at)); }
inline void store_ps(void *to, __m512 x) { storeu_ps(aligned(to), x); }
inline void store_si512(void *to, __m512i x) { storeu_si512(aligned(to), x); }
inline __m512 mask_loadu_ps(__m512 other, __mmask16 mask, const float *at) {
    const auto of = as<float>(other);
    return floats([=](int i) { return in(mask, i) ? at[i] : of[i]; });
}
inline __m512 maskz_loadu_ps(__mmask16 mask, const float *at) { return mask_loadu_ps(__m512{}, mask, at); }
inline void mask_storeu_ps(float *to, __mmask16 mask, __m512 x) {
    const auto of = as<float>(x);
    for (int i = 0; i < 16; ++i)
        if (in(mask, i)) to[i] = of[i];
}
inline __m512 i32gather_ps(__m512i index, const void *base, int scale) {
    const auto of = as<int32_t>(index);
    return floats([=](int i) {
        float value;
        std::memcpy(&value, static_cast<const uint8_t *>(base) + int64_t{of[i]} * scale, 4);
        return value;
    });
}

inline __m512 castsi512_ps(__m512i x) { return from<__m512>(as<float>(x)); }
inline __m512i castps_si512(__m512 x) { return from<__m512i>(as<float>(x)); }
inline __m512 castpd_ps(__m512d x) { return from<__m512>(as<float>(x)); }
inline __m512d castps_pd(__m512 x) { return from<__m512d>(as<float>(x)); }

inline __m512 add_ps(__m512 a, __m512 b) { return a + b; }
inline __m512 sub_ps(__m512 a, __m512 b) { return a - b; }
inline __m512 mul_ps(__m512 a, __m512 b) { return a * b; }
inline __m512 div_ps(__m512 a, __m512 b) { return a / b; }
inline __m512 add_round_ps(__m512 a, __m512 b, int) { return fixed(a + b); }
inline __m512 mul_round_ps(__m512 a, __m512 b, int) { return fixed(a * b); }
inline __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) { return fused(a, b, c); }
inline __m512 fmsub_ps(__m512 a, __m512 b, __m512 c) { return fused(a, b, -c); }
inline __m512 fnmadd_ps(__m512 a, __m512 b, __m512 c) { return fused(-a, b, c); }
inline __m512 abs_ps(__m512 x) {
    const auto of = as<uint32_t>(x);
    return from<__m512>(as<float>(words([=](int i) { return of[i] & 0x7fffffff; })));
}
inline __m512 max_ps(__m512 a, __m512 b) {  // the second where one is no number
    const auto x = as<float>(a), y = as<float>(b);
    return floats([=](int i) { return x[i] > y[i] ? x[i] : y[i]; });
}
inline __m512 mask_mov_ps(__m512 other, __mmask16 mask, __m512 x) {
    const auto a = as<float>(other), b = as<float>(x);
    return floats([=](int i) { return in(mask, i) ? b[i] : a[i]; });
}
inline __m512 maskz_mov_ps(__mmask16 mask, __m512 x) { return mask_mov_ps(__m512{}, mask, x); }
inline __m512 mask_max_ps(__m512 other, __mmask16 mask, __m512 a, __m512 b) { return mask_mov_ps(other, mask, max_ps(a, b)); }
inline __m512 maskz_mul_ps(__mmask16 mask, __m512 a, __m512 b) { return maskz_mov_ps(mask, a * b); }
inline __mmask16 mask_cmp_ps_mask(__mmask16 mask, __m512 a, __m512 b, int how) {
    if (how != _CMP_GT_OQ) __builtin_trap();
    const auto x = as<float>(a), y = as<float>(b);
    __mmask16 found = 0;
    for (int i = 0; i < 16; ++i) found |= (in(mask, i) && x[i] > y[i]) << i;
    return found;
}
inline __mmask16 cmp_ps_mask(__m512 a, __m512 b, int how) { return mask_cmp_ps_mask(0xffff, a, b, how); }
inline __m512 rcp14_ps(__m512 x) { return 1.0f / x; }
inline __m512 reduce_ps(__m512 x, int how) {  // what is beyond the whole number below; whole ones leave 0, the infinite too
    if ((how & 0xf7) != _MM_FROUND_TO_NEG_INF) __builtin_trap();
    const auto of = as<float>(x);
    return floats([=](int i) { return std::isinf(of[i]) ? 0.0f : of[i] - std::floor(of[i]); });
}
inline __m512 scalef_ps(__m512 x, __m512 power) {  // x times two to the whole number below
    const auto a = as<float>(x), b = as<float>(power);
    return floats([=](int i) {
        if (b[i] != b[i]) return b[i];
        return std::ldexp(a[i], static_cast<int>(std::floor(std::fmin(std::fmax(b[i], -1000.0f), 1000.0f))));
    });
}
inline float reduce_add_ps(__m512 x) {
    auto of = as<float>(x);
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) of[i] += of[i + half];
    return of[0];
}
inline float reduce_max_ps(__m512 x) {
    auto of = as<float>(x);
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) of[i] = of[i] > of[i + half] ? of[i] : of[i + half];
    return of[0];
}

inline __m512i add_epi16(__m512i a, __m512i b) {
    const auto x = as<uint16_t>(a), y = as<uint16_t>(b);
    return each<__m512i, uint16_t>([=](int i) { return static_cast<uint16_t>(x[i] + y[i]); });
}
inline __m512i add_epi32(__m512i a, __m512i b) {
    const auto x = as<uint32_t>(a), y = as<uint32_t>(b);
    return words([=](int i) { return static_cast<int32_t>(x[i] + y[i]); });
}
inline __m512i sub_epi32(__m512i a, __m512i b) {
    const auto x = as<uint32_t>(a), y = as<uint32_t>(b);
    return words([=](int i) { return static_cast<int32_t>(x[i] - y[i]); });
}
inline __m512i mullo_epi32(__m512i a, __m512i b) {
    const auto x = as<uint32_t>(a), y = as<uint32_t>(b);
    return words([=](int i) { return static_cast<int32_t>(x[i] * y[i]); });
}
inline __m512i max_epi32(__m512i a, __m512i b) {
    const auto x = as<int32_t>(a), y = as<int32_t>(b);
    return words([=](int i) { return x[i] > y[i] ? x[i] : y[i]; });
}
inline __m512i add_epi64(__m512i a, __m512i b) {
    const auto x = as<int64_t>(a), y = as<int64_t>(b);
    return each<__m512i, int64_t>([=](int i) { return x[i] + y[i]; });
}
inline __m512i and_si512(__m512i a, __m512i b) { return a & b; }
inline __m512i slli_epi32(__m512i x, unsigned by) {
    const auto of = as<uint32_t>(x);
    return words([=](int i) { return static_cast<int32_t>(of[i] << by); });
}
inline int32_t reduce_add_epi32(__m512i x) {
    const auto of = as<int32_t>(x);
    int32_t sum = 0;
    for (int i = 0; i < 16; ++i) sum += of[i];
    return sum;
}
inline int32_t reduce_max_epi32(__m512i x) {
    const auto of = as<int32_t>(x);
    int32_t most = of[0];
    for (int i = 1; i < 16; ++i) most = of[i] > most ? of[i] : most;
    return most;
}
inline __m512i dpbusd_epi32(__m512i sums, __m512i a, __m512i b) {
    const auto to = as<int32_t>(sums);
    const auto x = as<uint8_t>(a);
    const auto y = as<int8_t>(b);
    return words([=](int i) {
        int32_t sum = to[i];
        for (int byte = 0; byte < 4; ++byte) sum += x[4 * i + byte] * y[4 * i + byte];
        return sum;
    });
}

inline __m512 cvtepi32_ps(__m512i x) {
    const auto of = as<int32_t>(x);
    return floats([=](int i) { return static_cast<float>(of[i]); });
}
inline __m512i cvtps_epi32(__m512 x) {  // to the nearest; what has no place, and what is no number, is the lowest
    const auto of = as<float>(x);
    return words([=](int i) {
        return of[i] >= -0x1p31f && of[i] < 0x1p31f ? static_cast<int32_t>(std::nearbyint(of[i])) : INT32_MIN;
    });
}
inline __m512i cvtepu16_epi32(__m256i x) {
    uint16_t of[16];
    std::memcpy(of, &x, 32);
    return words([&](int i) { return static_cast<int32_t>(of[i]); });
}
inline __m128i cvtsepi32_epi8(__m512i x) {
    const auto of = as<int32_t>(x);
    int8_t to[16];
    for (int i = 0; i < 16; ++i) to[i] = static_cast<int8_t>(of[i] < -128 ? -128 : of[i] > 127 ? 127 : of[i]);
    __m128i bytes;
    std::memcpy(&bytes, to, 16);
    return bytes;
}
inline __m512i cvtne2ps_pbh(__m512 high, __m512 low) {
    const auto x = as<float>(low), y = as<float>(high);
    return each<__m512i, uint16_t>([=](int i) { return narrowed(i < 16 ? x[i] : y[i - 16]); });
}
inline __m256i cvtneps_pbh(__m512 x) {
    const auto of = as<float>(x);
    uint16_t to[16];
    for (int i = 0; i < 16; ++i) to[i] = narrowed(of[i]);
    __m256i halves;
    std::memcpy(&halves, to, 32);
    return halves;
}
inline __m512 dpbf16_ps(__m512 sums, __m512i a, __m512i b) {
    const Flushing flushing;
    const auto x = as<uint16_t>(a), y = as<uint16_t>(b);
    for (int odd = 1; odd >= 0; --odd)
        sums = fused(floats([=](int i) { return widened(x[2 * i + odd]); }),
                     floats([=](int i) { return widened(y[2 * i + odd]); }), sums);
    return sums;
}

// Of each 128 bits of both, in turn, what lies in the lower or the upper half.
template <typename T>
inline __m512i unpacked(__m512i a, __m512i b, bool high) {
    constexpr int LANE = 16 / sizeof(T);
    const auto x = as<T>(a), y = as<T>(b);
    return each<__m512i, T>([=](int i) {
        const int from = i / LANE * LANE + (high ? LANE / 2 : 0) + i % LANE / 2;
        return i % 2 ? y[from] : x[from];
    });
}
inline __m512i shuffle_i32x4(__m512i a, __m512i b, int places) {
    const auto x = as<uint32_t>(a), y = as<uint32_t>(b);
    return words([=](int i) {
        const int from = (places >> (2 * (i / 4)) & 3) * 4 + i % 4;
        return static_cast<int32_t>(i < 8 ? x[from] : y[from]);
    });
}
template <typename T, typename V>
inline V picked(V a, __m512i places, V b) {
    constexpr int N = Of<T>::N;
    const auto x = as<T>(a), y = as<T>(b), from_places = as<T>(places);
    return each<V, T>([=](int i) {
        const auto place = static_cast<int>(from_places[i] & (2 * N - 1));
        return place < N ? x[place] : y[place - N];
    });
}
inline __m512i permutexvar_epi16(__m512i places, __m512i x) {
    const auto of = as<uint16_t>(x), at = as<uint16_t>(places);
    return each<__m512i, uint16_t>([=](int i) { return of[at[i] & 31]; });
}

}  // namespace emulated

// ---- in place of the real ones ---------------------------------------------------------------------------------------

#undef _tile_loadconfig
#define _tile_loadconfig emulated::tile_loadconfig
#undef _tile_release
#define _tile_release emulated::tile_release
#undef _tile_zero
#define _tile_zero emulated::tile_zero
#undef _tile_loadd
#define _tile_loadd emulated::tile_loadd
#undef _tile_stored
#define _tile_stored emulated::tile_stored
#undef _tile_dpbf16ps
#define _tile_dpbf16ps emulated::tile_dpbf16ps
#undef _tile_dpbsud
#define _tile_dpbsud emulated::tile_dpbsud
#define syscall(...) 0L  // which asks whether tiles may be used
#define __m512bh __m512i
#undef _mm512_abs_ps
#define _mm512_abs_ps emulated::abs_ps
#undef _mm512_add_epi16
#define _mm512_add_epi16 emulated::add_epi16
#undef _mm512_add_epi32
#define _mm512_add_epi32 emulated::add_epi32
#undef _mm512_add_epi64
#define _mm512_add_epi64 emulated::add_epi64
#undef _mm512_add_ps
#define _mm512_add_ps emulated::add_ps
#undef _mm512_add_round_ps
#define _mm512_add_round_ps emulated::add_round_ps
#undef _mm512_and_si512
#define _mm512_and_si512 emulated::and_si512
#undef _mm512_castpd_ps
#define _mm512_castpd_ps emulated::castpd_ps
#undef _mm512_castps_pd
#define _mm512_castps_pd emulated::castps_pd
#undef _mm512_castps_si512
#define _mm512_castps_si512 emulated::castps_si512
#undef _mm512_castsi512_ps
#define _mm512_castsi512_ps emulated::castsi512_ps
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask emulated::cmp_ps_mask
#undef _mm512_cvtepi32_ps
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#undef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#undef _mm512_cvtne2ps_pbh
#define _mm512_cvtne2ps_pbh emulated::cvtne2ps_pbh
#undef _mm512_cvtneps_pbh
#define _mm512_cvtneps_pbh emulated::cvtneps_pbh
#undef _mm512_cvtps_epi32
#define _mm512_cvtps_epi32 emulated::cvtps_epi32
#undef _mm512_cvtsepi32_epi8
#define _mm512_cvtsepi32_epi8 emulated::cvtsepi32_epi8
#undef _mm512_div_ps
#define _mm512_div_ps emulated::div_ps
#undef _mm512_dpbf16_ps
#define _mm512_dpbf16_ps emulated::dpbf16_ps
#undef _mm512_dpbusd_epi32
#define _mm512_dpbusd_epi32 emulated::dpbusd_epi32
#undef _mm512_fmadd_ps
#define _mm512_fmadd_ps emulated::fmadd_ps
#undef _mm512_fmsub_ps
#define _mm512_fmsub_ps emulated::fmsub_ps
#undef _mm512_fnmadd_ps
#define _mm512_fnmadd_ps emulated::fnmadd_ps
#undef _mm512_i32gather_ps
#define _mm512_i32gather_ps emulated::i32gather_ps
#undef _mm512_load_ps
#define _mm512_load_ps emulated::load_ps
#undef _mm512_load_si512
#define _mm512_load_si512 emulated::load_si512
#undef _mm512_loadu_ps
#define _mm512_loadu_ps emulated::loadu_ps
#undef _mm512_loadu_si512
#define _mm512_loadu_si512 emulated::loadu_si512
#undef _mm512_mask_cmp_ps_mask
#define _mm512_mask_cmp_ps_mask emulated::mask_cmp_ps_mask
#undef _mm512_mask_loadu_ps
#define _mm512_mask_loadu_ps emulated::mask_loadu_ps
#undef _mm512_mask_max_ps
#define _mm512_mask_max_ps emulated::mask_max_ps
#undef _mm512_mask_mov_ps
#define _mm512_mask_mov_ps emulated::mask_mov_ps
#undef _mm512_mask_storeu_ps
#define _mm512_mask_storeu_ps emulated::mask_storeu_ps
#undef _mm512_maskz_loadu_ps
#define _mm512_maskz_loadu_ps emulated::maskz_loadu_ps
#undef _mm512_maskz_mov_ps
#define _mm512_maskz_mov_ps emulated::maskz_mov_ps
#undef _mm512_maskz_mul_ps
#define _mm512_maskz_mul_ps emulated::maskz_mul_ps
#undef _mm512_max_epi32
#define _mm512_max_epi32 emulated::max_epi32
#undef _mm512_max_ps
#define _mm512_max_ps emulated::max_ps
#undef _mm512_mul_ps
#define _mm512_mul_ps emulated::mul_ps
#undef _mm512_mul_round_ps
#define _mm512_mul_round_ps emulated::mul_round_ps
#undef _mm512_mullo_epi32
#define _mm512_mullo_epi32 emulated::mullo_epi32
#undef _mm512_permutex2var_epi16
#define _mm512_permutex2var_epi16 emulated::picked<uint16_t>
#undef _mm512_permutex2var_pd
#define _mm512_permutex2var_pd emulated::picked<uint64_t>
#undef _mm512_permutexvar_epi16
#define _mm512_permutexvar_epi16 emulated::permutexvar_epi16
#undef _mm512_rcp14_ps
#define _mm512_rcp14_ps emulated::rcp14_ps
#undef _mm512_reduce_add_epi32
#define _mm512_reduce_add_epi32 emulated::reduce_add_epi32
#undef _mm512_reduce_add_ps
#define _mm512_reduce_add_ps emulated::reduce_add_ps
#undef _mm512_reduce_max_epi32
#define _mm512_reduce_max_epi32 emulated::reduce_max_epi32
#undef _mm512_reduce_max_ps
#define _mm512_reduce_max_ps emulated::reduce_max_ps
#undef _mm512_reduce_ps
#define _mm512_reduce_ps emulated::reduce_ps
#undef _mm512_scalef_ps
#define _mm512_scalef_ps emulated::scalef_ps
#undef _mm512_set1_epi16
#define _mm512_set1_epi16 emulated::set1_epi16
#undef _mm512_set1_epi32
#define _mm512_set1_epi32 emulated::set1_epi32
#undef _mm512_set1_epi64
#define _mm512_set1_epi64 emulated::set1_epi64
#undef _mm512_set1_ps
#define _mm512_set1_ps emulated::set1_ps
#undef _mm512_setr_epi32
#define _mm512_setr_epi32 emulated::setr_epi32
#undef _mm512_setr_epi64
#define _mm512_setr_epi64 emulated::setr_epi64
#undef _mm512_setzero_ps
#define _mm512_setzero_ps emulated::setzero_ps
#undef _mm512_setzero_si512
#define _mm512_setzero_si512 emulated::setzero_si512
#undef _mm512_shuffle_i32x4
#define _mm512_shuffle_i32x4 emulated::shuffle_i32x4
#undef _mm512_slli_epi32
#define _mm512_slli_epi32 emulated::slli_epi32
#undef _mm512_store_ps
#define _mm512_store_ps emulated::store_ps
#undef _mm512_store_si512
#define _mm512_store_si512 emulated::store_si512
#undef _mm512_storeu_ps
#define _mm512_storeu_ps emulated::storeu_ps
#undef _mm512_storeu_si512
#define _mm512_storeu_si512 emulated::storeu_si512
#undef _mm512_sub_epi32
#define _mm512_sub_epi32 emulated::sub_epi32
#undef _mm512_sub_ps
#define _mm512_sub_ps emulated::sub_ps
#undef _mm512_unpacklo_epi16
#define _mm512_unpacklo_epi16(a, b) emulated::unpacked<uint16_t>(a, b, false)
#undef _mm512_unpackhi_epi16
#define _mm512_unpackhi_epi16(a, b) emulated::unpacked<uint16_t>(a, b, true)
#undef _mm512_unpacklo_epi32
#define _mm512_unpacklo_epi32(a, b) emulated::unpacked<uint32_t>(a, b, false)
#undef _mm512_unpackhi_epi32
#define _mm512_unpackhi_epi32(a, b) emulated::unpacked<uint32_t>(a, b, true)
#undef _mm512_unpacklo_epi64
#define _mm512_unpacklo_epi64(a, b) emulated::unpacked<uint64_t>(a, b, false)
#undef _mm512_unpackhi_epi64
#define _mm512_unpackhi_epi64(a, b) emulated::unpacked<uint64_t>(a, b, true)
#undef __AMX_BF16__
#define __AMX_BF16__ 1
#undef __AMX_INT8__
#define __AMX_INT8__ 1
#undef __AVX512BF16__
#define __AVX512BF16__ 1
#undef __AVX512VNNI__
#define __AVX512VNNI__ 1

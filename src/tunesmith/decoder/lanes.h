// Vectors of floats as wide as the processor's registers, and e^x of them.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

// Wider vectors than there are registers for would be kept in memory between two operations. Tests compile those of other
// processors all the same (TUNESMITH_LANES); FULL_VECTORS: they are as wide as the registers of this one.
#if defined(TUNESMITH_LANES)
#define FULL_VECTORS 0
constexpr int LANES = TUNESMITH_LANES;
constexpr bool MANY_REGISTERS = LANES == 16;  // 32, else 16
#else
#define FULL_VECTORS 1
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr bool MANY_REGISTERS = true;
#else
constexpr bool MANY_REGISTERS = false;
#endif
#endif
using Lanes = float __attribute__((vector_size(sizeof(float) * LANES), aligned(4)));
using Words = int32_t __attribute__((vector_size(sizeof(float) * LANES)));

inline Lanes read(const float *from) { return *reinterpret_cast<const Lanes *>(from); }
inline void write(float *to, Lanes x) { *reinterpret_cast<Lanes *>(to) = x; }

// To about 1e-7 relative; beyond -87 and 88 that of -87 and 88. NaN stays NaN.
inline Lanes exponential(Lanes x) {
    x = x < -87.0f ? Lanes{} - 87.0f : x;
    x = x > 88.0f ? Lanes{} + 88.0f : x;
    const Lanes turns = x * 1.44269504f;
    const Words whole = __builtin_convertvector(turns + (turns < 0.0f ? Lanes{} - 0.5f : Lanes{} + 0.5f), Words);
    const Lanes steps = __builtin_convertvector(whole, Lanes);
    const Lanes r = (x - steps * 0.693359375f) + steps * 2.12194440e-4f;
    Lanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const Words power = (whole + 127) << 23;
    return p * (Lanes)power;
}

// x[i] = e^(x[i] - highest), and their sum.
inline float exponentials(float *x, int n) {
    float highest = x[0], sum = 0.0f;
    Lanes most = Lanes{} + highest, sums{};
    int i = 0;
    for (; i + LANES <= n; i += LANES) most = read(x + i) > most ? read(x + i) : most;
    for (int lane = 0; lane < LANES; ++lane) highest = most[lane] > highest ? most[lane] : highest;
    for (; i < n; ++i) highest = x[i] > highest ? x[i] : highest;
    i = 0;
    for (; i + LANES <= n; i += LANES) {
        const Lanes value = exponential(read(x + i) - highest);
        write(x + i, value);
        sums += value;
    }
    if (i < n) {
        float rest[LANES] = {};
        std::memcpy(rest, x + i, sizeof(float) * (n - i));
        write(rest, exponential(read(rest) - highest));
        std::memcpy(x + i, rest, sizeof(float) * (n - i));
        for (; i < n; ++i) sum += x[i];
    }
    for (int lane = 0; lane < LANES; ++lane) sum += sums[lane];
    return sum;
}

// to = gate / (1 + e^-gate) up
inline void gated(const float *gate, const float *up, float *to, int n) {
    int i = 0;
    for (; i + LANES <= n; i += LANES) {
        const Lanes g = read(gate + i);
        write(to + i, g / (1.0f + exponential(-g)) * read(up + i));
    }
    for (; i < n; ++i) to[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
}

inline float dot(const float *__restrict a, const float *__restrict b, int n) {
    Lanes sums[2]{};
    int i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        sums[0] += read(a + i) * read(b + i);
        sums[1] += read(a + i + LANES) * read(b + i + LANES);
    }
    sums[0] += sums[1];
    float sum = 0.0f;
    for (; i < n; ++i) sum += a[i] * b[i];
    for (int lane = 0; lane < LANES; ++lane) sum += sums[0][lane];
    return sum;
}

inline void norm(const float *x, const float *gain, float *y, int n, float epsilon) {
    const float scale = 1.0f / std::sqrt(dot(x, x, n) / n + epsilon);
    for (int i = 0; i < n; ++i) y[i] = x[i] * scale * gain[i];
}

inline void rotate(float *x, const float *cosines, const float *sines, int half) {
    for (int i = 0; i < half; ++i) {
        const float first = x[i], second = x[i + half];
        x[i] = first * cosines[i] - second * sines[i];
        x[i + half] = second * cosines[i] + first * sines[i];
    }
}

}  // namespace

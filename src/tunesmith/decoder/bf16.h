// Numbers of 16 bits: the upper half of a float.

#pragma once

#include <cstdint>
#include <cstring>

struct bf16 {
    uint16_t bits;
};

namespace {

inline float load(float x) { return x; }
inline float load(bf16 x) {
    uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline void store(float *to, float x) { *to = x; }
inline void store(bf16 *to, float x) {  // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    to->bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float root_of_inverse(float x) { return 1.0f / __builtin_sqrtf(x); }

}  // namespace

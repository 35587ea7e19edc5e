// Activations, scales and results in float32, float16 and bfloat16.
#pragma once

#include "simd.h"

enum Kind { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

static inline uint32_t bits_of(float a) {
    uint32_t bits;
    std::memcpy(&bits, &a, 4);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float a;
    std::memcpy(&a, &bits, 4);
    return a;
}

// `count` divides by 8.
static inline void read(float* to, const void* from, int64_t at, Kind kind, int count) {
    if (kind == FLOAT32) {
        std::memcpy(to, static_cast<const float*>(from) + at, 4 * count);
    } else if (kind == FLOAT16) {
        const uint16_t* half = static_cast<const uint16_t*>(from) + at;
        for (int i = 0; i < count; i += 8) floats_of_halves(to + i, half + i);
    } else {
        const uint16_t* high = static_cast<const uint16_t*>(from) + at;
        for (int i = 0; i < count; i++) to[i] = float_of(uint32_t(high[i]) << 16);
    }
}

static inline uint16_t to_bfloat16(float a) {
    const uint32_t bits = bits_of(a);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;  // rounding could turn NaN into infinity
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline void write(void* to, int64_t at, const float* from, Kind kind, int count) {
    if (kind == FLOAT32) {
        std::memcpy(static_cast<float*>(to) + at, from, 4 * count);
    } else if (kind == BFLOAT16) {
        uint16_t* high = static_cast<uint16_t*>(to) + at;
        for (int i = 0; i < count; i++) high[i] = to_bfloat16(from[i]);
    } else {
        uint16_t* half = static_cast<uint16_t*>(to) + at;
        int i = 0;
        for (; i + 8 <= count; i += 8) halves_of_floats(half + i, from + i);
        if (i == count) return;
        float last[8] = {};
        uint16_t halves[8];
        std::memcpy(last, from + i, 4 * (count - i));
        halves_of_floats(halves, last);
        std::memcpy(half + i, halves, 2 * (count - i));
    }
}

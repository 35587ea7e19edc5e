// A call, and its activations: written in whole numbers, chunk by chunk.
#pragma once

#include <cmath>

#include "numbers.h"

constexpr int CHUNK = 128;  // input channels that share an activation's scale, at most

struct Call {
    const void* x;
    int64_t x_stride;
    Kind x_kind;
    int64_t rows, columns, outputs;
    const uint8_t* codes;
    const void* scales;
    Kind scale_kind;
    const uint8_t* zeros;
    int64_t group;
    int planes;  // 2 where a code has more than 4 bits, 1 otherwise
    void* out;
    int chunk;
    int64_t chunks;
    // Packed activations: digits [chunks][rows][digits][chunk], scale and sum [chunks][rows].
    int8_t* digits;
    float* x_scale;
    float* x_sum;
};

// Scale of a chunk whose largest value is `largest`, and its inverse; NaN and 0 where that is no number.
template <int D>
void scale_of(float largest, float& scale, float& inverse) {
    if (!(largest < INFINITY)) {
        scale = NAN;
        inverse = 0;
    } else if (D == 1) {
        scale = largest / 127;
        inverse = 127 / largest;
        if (!(inverse < INFINITY)) inverse = scale = 0;
    } else {
        // A power of two, so that short numbers stay what they are. One bit is left for the carry.
        int exponent = int(bits_of(largest) >> 23) - 126 - (8 * D - 2);
        exponent = exponent < -126 ? -126 : exponent;
        scale = float_of(uint32_t(127 + exponent) << 23);
        inverse = float_of(uint32_t(127 - exponent) << 23);
    }
}

// One chunk of one row.
template <int D>
void pack_chunk(const Call& call, int64_t row, int64_t c) {
    alignas(32) float values[CHUNK];
    const int n = call.chunk;
    read(values, call.x, row * call.x_stride + c * n, call.x_kind, n);
    float scale, inverse;
    scale_of<D>(float_of(largest_size(values, n)), scale, inverse);
    const int64_t at = c * call.rows + row;
    call.x_scale[at] = scale;
    call.x_sum[at] = float(write_digits<D>(call.digits + at * D * n, values, inverse, n));
}

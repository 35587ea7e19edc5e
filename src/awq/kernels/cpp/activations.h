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

// One chunk of one row; always eight values at a time, for AVX2 has all that it takes.
template <int D>
void pack_chunk(const Call& call, int64_t row, int64_t c) {
    alignas(32) float values[CHUNK];
    const int n = call.chunk;
    read(values, call.x, row * call.x_stride + c * n, call.x_kind, n);
    // As whole numbers, sizes of floats have the order of the floats, and NaN is above infinity.
    __m256i most = _mm256_setzero_si256();
    for (int i = 0; i < n; i += 8) {
        const __m256i bits = _mm256_castps_si256(_mm256_load_ps(values + i));
        most = _mm256_max_epi32(most, _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)));
    }
    alignas(32) uint32_t eight[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(eight), most);
    uint32_t largest = 0;
    for (uint32_t size : eight) largest = size > largest ? size : largest;
    float scale, inverse;
    scale_of<D>(float_of(largest), scale, inverse);
    int8_t* digits = call.digits + (c * call.rows + row) * D * n;
    const __m256i first_bytes = _mm256_set1_epi32(0x0c080400);
    __m256i sum = _mm256_setzero_si256();
    for (int i = 0; i < n; i += 8) {
        const __m256 scaled = _mm256_mul_ps(_mm256_load_ps(values + i), _mm256_set1_ps(inverse));
        __m256i left = _mm256_cvtps_epi32(scaled);
        sum = _mm256_add_epi32(sum, left);
        for (int d = 0; d < D; d++) {
            // Interleaving the bytes of both halves gives ORDER.
            const __m256i bytes = _mm256_shuffle_epi8(left, first_bytes);
            const __m128i both =
                _mm_unpacklo_epi8(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
            _mm_storel_epi64(reinterpret_cast<__m128i*>(digits + d * n + i), both);
            const __m256i digit = _mm256_srai_epi32(_mm256_slli_epi32(left, 24), 24);
            left = _mm256_srai_epi32(_mm256_sub_epi32(left, digit), 8);
        }
    }
    _mm256_store_si256(reinterpret_cast<__m256i*>(eight), sum);
    int64_t total = 0;
    for (uint32_t part : eight) total += int32_t(part);
    call.x_scale[c * call.rows + row] = scale;
    call.x_sum[c * call.rows + row] = float(total);
}

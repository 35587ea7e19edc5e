// AVX2 and AVX512, each with and without VNNI.
#pragma once

#include <immintrin.h>

#include <cstdint>

#if defined(__AVX512VNNI__) || (defined(__AVXVNNI__) && !defined(__AVX512BW__))
constexpr int STEPS = 0;
#else
constexpr int STEPS = 8;  // a step adds at most 2 * 15 * 128
#endif

#if defined(__AVX512BW__)

constexpr int LANES = 16;
constexpr int VECTORS = 4;
using ivec = __m512i;
using fvec = __m512;

static inline ivec iload(const void* p) { return _mm512_loadu_si512(p); }
static inline void istore(void* p, ivec a) { _mm512_storeu_si512(p, a); }
static inline ivec izero() { return _mm512_setzero_si512(); }
static inline ivec iset(int32_t a) { return _mm512_set1_epi32(a); }
static inline ivec ibroadcast(const void* p) { return _mm512_broadcastd_epi32(_mm_loadu_si32(p)); }
static inline ivec iand(ivec a, ivec b) { return _mm512_and_si512(a, b); }
static inline ivec iadd(ivec a, ivec b) { return _mm512_add_epi32(a, b); }
static inline ivec right4(ivec a) { return _mm512_srli_epi32(a, 4); }
static inline ivec left8(ivec a) { return _mm512_slli_epi32(a, 8); }
static inline fvec to_float(ivec a) { return _mm512_cvtepi32_ps(a); }
static inline fvec fload(const float* p) { return _mm512_loadu_ps(p); }
static inline void fstore(float* p, fvec a) { _mm512_storeu_ps(p, a); }
static inline fvec fset(float a) { return _mm512_set1_ps(a); }
static inline fvec fmul(fvec a, fvec b) { return _mm512_mul_ps(a, b); }
static inline fvec fma(fvec a, fvec b, fvec c) { return _mm512_fmadd_ps(a, b, c); }
static inline fvec fnma(fvec a, fvec b, fvec c) { return _mm512_fnmadd_ps(a, b, c); }
static inline fvec fmax(fvec a, fvec b) { return _mm512_max_ps(a, b); }
static inline ivec to_int(fvec a) { return _mm512_cvtps_epi32(a); }
static inline fvec times_power(fvec a, ivec n) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_slli_epi32(n, 23)));
}
static inline ivec dot(ivec sum, ivec codes, ivec x) {
#if defined(__AVX512VNNI__)
    // As an intrinsic, compilers copy each sum to another register before, and back after.
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));
    return sum;
#else
    ivec pairs;
    asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+v"(sum), "=&v"(pairs) : "v"(codes), "v"(x));
    return sum;
#endif
}
static inline ivec widen(ivec pairs) { return _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)); }

#elif defined(__AVX2__)

constexpr int LANES = 8;
constexpr int VECTORS = 2;
using ivec = __m256i;
using fvec = __m256;

static inline ivec iload(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
static inline void istore(void* p, ivec a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
static inline ivec izero() { return _mm256_setzero_si256(); }
static inline ivec iset(int32_t a) { return _mm256_set1_epi32(a); }
static inline ivec ibroadcast(const void* p) { return _mm256_broadcastd_epi32(_mm_loadu_si32(p)); }
static inline ivec iand(ivec a, ivec b) { return _mm256_and_si256(a, b); }
static inline ivec iadd(ivec a, ivec b) { return _mm256_add_epi32(a, b); }
static inline ivec right4(ivec a) { return _mm256_srli_epi32(a, 4); }
static inline ivec left8(ivec a) { return _mm256_slli_epi32(a, 8); }
static inline fvec to_float(ivec a) { return _mm256_cvtepi32_ps(a); }
static inline fvec fload(const float* p) { return _mm256_loadu_ps(p); }
static inline void fstore(float* p, fvec a) { _mm256_storeu_ps(p, a); }
static inline fvec fset(float a) { return _mm256_set1_ps(a); }
static inline fvec fmul(fvec a, fvec b) { return _mm256_mul_ps(a, b); }
static inline fvec fma(fvec a, fvec b, fvec c) { return _mm256_fmadd_ps(a, b, c); }
static inline fvec fnma(fvec a, fvec b, fvec c) { return _mm256_fnmadd_ps(a, b, c); }
static inline fvec fmax(fvec a, fvec b) { return _mm256_max_ps(a, b); }
static inline ivec to_int(fvec a) { return _mm256_cvtps_epi32(a); }
static inline fvec times_power(fvec a, ivec n) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), _mm256_slli_epi32(n, 23)));
}
static inline ivec dot(ivec sum, ivec codes, ivec x) {
#if defined(__AVXVNNI__)
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(codes), "x"(x));
    return sum;
#else
    // As intrinsics, GCC multiplies far ahead of adding, and runs out of registers.
    ivec pairs;
    asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sum), "=&x"(pairs) : "x"(codes), "x"(x));
    return sum;
#endif
}
static inline ivec widen(ivec pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }

#endif

// ---- activations: always eight at a time, for AVX2 has all that they take ----------------------------------

static inline void floats_of_halves(float* to, const uint16_t* from) {
    const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    _mm256_storeu_ps(to, _mm256_cvtph_ps(eight));
}

static inline void halves_of_floats(uint16_t* to, const float* from) {
    const __m128i eight = _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), eight);
}

// Bits of the largest size of n values. As whole numbers, sizes of floats have the order of the floats, and
// NaN is above infinity.
static inline uint32_t largest_size(const float* values, int n) {
    __m256i most = _mm256_setzero_si256();
    for (int i = 0; i < n; i += 8) {
        const __m256i bits = _mm256_castps_si256(_mm256_loadu_ps(values + i));
        most = _mm256_max_epi32(most, _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)));
    }
    uint32_t eight[8], largest = 0;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(eight), most);
    for (uint32_t size : eight) largest = size > largest ? size : largest;
    return largest;
}

// Writes n values times `inverse` in whole numbers of D digits, [D][n] with each eight in ORDER; returns the
// sum of the whole numbers.
template <int D>
int64_t write_digits(int8_t* digits, const float* values, float inverse, int n) {
    const __m256i first_bytes = _mm256_set1_epi32(0x0c080400);
    __m256i sum = _mm256_setzero_si256();
    for (int i = 0; i < n; i += 8) {
        const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(values + i), _mm256_set1_ps(inverse));
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
    int32_t eight[8];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(eight), sum);
    int64_t total = 0;
    for (int32_t part : eight) total += part;
    return total;
}

// The vector operations that the product needs, once for each width.
//
// `dot` is the heart: for each 32-bit lane, four unsigned bytes times four signed bytes, added to the lane.
// Codes are below 16, so that the pairwise 16-bit sums of `maddubs` cannot overflow where there is no VNNI.
#pragma once

#include <immintrin.h>

#include <cstdint>

#if defined(__AVX512BW__)

constexpr int LANES = 16;
constexpr int VECTORS = 4;  // per tile: with six rows they leave room for the weights in 32 registers
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
static inline ivec dot(ivec sum, ivec codes, ivec x) {
#if defined(__AVX512VNNI__)
    // As an intrinsic, compilers copy each sum to another register before, and back after.
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));
    return sum;
#else
    const ivec pairs = _mm512_maddubs_epi16(codes, x);
    return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
}

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
static inline ivec dot(ivec sum, ivec codes, ivec x) {
#if defined(__AVXVNNI__)
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(codes), "x"(x));
    return sum;
#else
    const ivec pairs = _mm256_maddubs_epi16(codes, x);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}

#else
#error "no vector instructions known for this target"
#endif

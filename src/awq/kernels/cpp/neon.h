// NEON, with and without its dot product; little-endian.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

constexpr int LANES = 4;
constexpr int VECTORS = 4;
constexpr int STEPS = 0;
using ivec = int32x4_t;
using fvec = float32x4_t;

static inline ivec iload(const void* p) {
    return vreinterpretq_s32_u8(vld1q_u8(static_cast<const uint8_t*>(p)));
}
static inline void istore(void* p, ivec a) { vst1q_u8(static_cast<uint8_t*>(p), vreinterpretq_u8_s32(a)); }
static inline ivec izero() { return vdupq_n_s32(0); }
static inline ivec iset(int32_t a) { return vdupq_n_s32(a); }
static inline ivec ibroadcast(const void* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return vdupq_n_s32(four);
}
static inline ivec iand(ivec a, ivec b) { return vandq_s32(a, b); }
static inline ivec iadd(ivec a, ivec b) { return vaddq_s32(a, b); }
static inline ivec right4(ivec a) { return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a), 4)); }
static inline ivec left8(ivec a) { return vshlq_n_s32(a, 8); }
static inline fvec to_float(ivec a) { return vcvtq_f32_s32(a); }
static inline fvec fload(const float* p) { return vld1q_f32(p); }
static inline void fstore(float* p, fvec a) { vst1q_f32(p, a); }
static inline fvec fset(float a) { return vdupq_n_f32(a); }
static inline fvec fmul(fvec a, fvec b) { return vmulq_f32(a, b); }
static inline fvec fma(fvec a, fvec b, fvec c) { return vfmaq_f32(c, a, b); }
static inline fvec fnma(fvec a, fvec b, fvec c) { return vfmsq_f32(c, a, b); }
static inline fvec fmax(fvec a, fvec b) { return vmaxq_f32(a, b); }
static inline ivec to_int(fvec a) { return vcvtnq_s32_f32(a); }
static inline fvec times_power(fvec a, ivec n) {
    return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(a), vshlq_n_s32(n, 23)));
}
static inline ivec dot(ivec sum, ivec codes, ivec x) {
    const int8x16_t a = vreinterpretq_s8_s32(codes), b = vreinterpretq_s8_s32(x);
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(sum, a, b);
#else
    const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b));
    return vpadalq_s16(sum, vpaddq_s16(low, vmull_high_s8(a, b)));
#endif
}
static inline ivec widen(ivec sum) { return sum; }

// ---- activations, as in avx.h ------------------------------------------------------------------------------

static inline void floats_of_halves(float* to, const uint16_t* from) {
    const float16x8_t eight = vreinterpretq_f16_u16(vld1q_u16(from));
    vst1q_f32(to, vcvt_f32_f16(vget_low_f16(eight)));
    vst1q_f32(to + 4, vcvt_high_f32_f16(eight));
}

static inline void halves_of_floats(uint16_t* to, const float* from) {
    const float16x4_t low = vcvt_f16_f32(vld1q_f32(from));
    vst1q_u16(to, vreinterpretq_u16_f16(vcvt_high_f16_f32(low, vld1q_f32(from + 4))));
}

static inline uint32_t largest_size(const float* values, int n) {
    uint32x4_t most = vdupq_n_u32(0);
    for (int i = 0; i < n; i += 4) {
        const uint32x4_t bits = vreinterpretq_u32_f32(vld1q_f32(values + i));
        most = vmaxq_u32(most, vandq_u32(bits, vdupq_n_u32(0x7fffffff)));
    }
    return vmaxvq_u32(most);
}

template <int D>
int64_t write_digits(int8_t* digits, const float* values, float inverse, int n) {
    const uint8x8_t order = vcreate_u8(0x0703060205010400);  // ORDER, the first in the lowest byte
    int32x4_t sum = vdupq_n_s32(0);
    for (int i = 0; i < n; i += 8) {
        int32x4_t first = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(values + i), inverse));
        int32x4_t last = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(values + i + 4), inverse));
        sum = vaddq_s32(sum, vaddq_s32(first, last));
        for (int d = 0; d < D; d++) {
            const int8x8_t bytes = vmovn_s16(vcombine_s16(vmovn_s32(first), vmovn_s32(last)));
            vst1_s8(digits + d * n + i, vtbl1_s8(bytes, vreinterpret_s8_u8(order)));
            first = vshrq_n_s32(vsubq_s32(first, vshrq_n_s32(vshlq_n_s32(first, 24), 24)), 8);
            last = vshrq_n_s32(vsubq_s32(last, vshrq_n_s32(vshlq_n_s32(last, 24), 24)), 8);
        }
    }
    return vaddlvq_s32(sum);
}

// Sums in an order that is the same whatever the length of a vector.
#pragma once

#include "simd.h"

constexpr int WIDE = 16;  // partial sums

// WIDE sums of products.
struct Wide {
    fvec parts[WIDE / LANES];

    Wide() {
        for (fvec& part : parts) part = fset(0);
    }
    void add_product(const float* a, const float* b) {
        for (int v = 0; v < WIDE / LANES; v++)
            parts[v] = fma(fload(a + v * LANES), fload(b + v * LANES), parts[v]);
    }
    float total() const {
        alignas(64) float sums[WIDE];
        for (int v = 0; v < WIDE / LANES; v++) fstore(sums + v * LANES, parts[v]);
        for (int i = 0; i < 8; i++) sums[i] += sums[i + 8];
        for (int i = 0; i < 4; i++) sums[i] += sums[i + 4];
        return (sums[0] + sums[2]) + (sums[1] + sums[3]);
    }
};

// e to the power of WIDE numbers of at most 0, to about 2e-7 of each; below -87 it is that of -87.
static inline void exponentials(float* to, const float* from) {
    for (int v = 0; v < WIDE; v += LANES) {
        const fvec x = fmax(fset(-87), fload(from + v));
        const ivec n = to_int(fmul(x, fset(1.44269504f)));
        const fvec whole = to_float(n);
        // The logarithm of 2 in two parts, of which the first has few bits: its multiples are exact.
        fvec rest = fnma(whole, fset(0.693359375f), x);
        rest = fnma(whole, fset(-2.12194440e-4f), rest);
        fvec sum = fset(1.0f / 720);
        for (const float factor : {1.0f / 120, 1.0f / 24, 1.0f / 6, 1.0f / 2, 1.0f, 1.0f})
            sum = fma(sum, rest, fset(factor));
        fstore(to + v, times_power(sum, n));
    }
}

// The vector operations that the product needs, once for each family of processors.
//
// A vector has LANES lanes of 32 bits; a tile has VECTORS of them, which with six rows leave room for the
// weights in the registers. `dot` is the heart: for each lane, four unsigned bytes times four signed bytes,
// added to the lane. Codes are below 16, so that they may be taken for signed bytes. Where STEPS is not 0, `dot`
// adds to sums of 16 bits, two to a lane, which hold that many steps; `widen` makes them one of 32. `times_power`
// multiplies with a power of 2 (normal numbers only), and `fmax` of a number and NaN is NaN if NaN is the second.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__aarch64__)
#include "neon.h"
#elif defined(__AVX2__)
#include "avx.h"
#else
#error "no vector instructions known for this target"
#endif

// Past the end of the memory this does nothing.
static inline void fetch(const void* p) { __builtin_prefetch(p, 0, 3); }

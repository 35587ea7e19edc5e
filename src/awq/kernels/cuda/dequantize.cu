// The weight as floats: (code - zero) * scale in float32, then rounded. A warp writes blocks out row by row.
//
// Constants: BF16, PARTS; blocks are those of few_rows.cu.

#include "hopper.h"

constexpr int WARPS = 8;
constexpr int BLOCK_BYTES = 1024 + 64 * PARTS;
constexpr int ROW_WORDS = 64 + 4;                // of 128 numbers, and as many bytes as keep rows in different banks

extern "C" __global__ void __launch_bounds__(32 * WARPS)
dequantize(const unsigned char* blocks, uint4* out, long long count, long long across) {
    __shared__ __align__(16) u32 shared[WARPS][16 * ROW_WORDS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    launch_next();
    launch_wait();
    const long long block = static_cast<long long>(blockIdx.x) * WARPS + warp;
    if (block >= count) return;
    const unsigned char* source = blocks + block * BLOCK_BYTES;
    const uint4 codes[2] = {reinterpret_cast<const uint4*>(source)[lane], reinterpret_cast<const uint4*>(source)[32 + lane]};
    const u32* words = reinterpret_cast<const u32*>(codes);
    const u32* pairs = reinterpret_cast<const u32*>(source + 1024);
#pragma unroll
    for (int step = 0; step < 8; ++step) {
        const int part = step * PARTS / 8;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const u32 pair = pairs[part * 16 + g + 8 * half];
            const float scale = scale_of(pair), zero = zero_of(pair);
#pragma unroll
            for (int high = 0; high < 2; ++high) {
                const u32 both = words[step] >> (4 * (half + 2 * high));
                const float first = (static_cast<float>(both & 15) - zero) * scale;
                const float second = (static_cast<float>(both >> 16 & 15) - zero) * scale;
                shared[warp][(g + 8 * half) * ROW_WORDS + step * 8 + high * 4 + t] = rounded(first, second);
            }
        }
    }
    __syncwarp();
    const long long tile = block / across, column = block % across;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int row = 2 * i + lane / 16, piece = lane % 16;
        const uint4 found = *reinterpret_cast<const uint4*>(&shared[warp][row * ROW_WORDS + piece * 4]);
        out[((tile * 16 + row) * across + column) * 16 + piece] = found;
    }
}

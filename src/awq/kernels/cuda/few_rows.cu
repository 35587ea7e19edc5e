// A product of few rows: each processor reads its share of the weights once, as fast as memory gives them.
//
// The weight lies in blocks of 16 output channels by 128 input channels (`kernels/hopper_layout.py`). A block
// is 1024 bytes of codes, in the order in which the threads of a warp hold a matrix unit's operand, and for
// each group in it 16 words of scale and zero point. Blocks of the same output channels follow one another, so
// a stage of STAGE blocks is one contiguous copy.
//
// Codes are multiplied as they lie there, as subnormal numbers, which costs five instructions for eight codes.
// Those of the lower eight channels stay sixteen times as large. Zero points are taken off the sums: zero *
// (sum of the block's activations). bfloat16 activations are first multiplied by 2 ** 64, exactly below 2 ** 63,
// so that products stay clear of the smallest float32.
//
// Constants: BF16, ROWS (1, 2, 4 or 8), PARTS (groups in a block: 1, 2 or 4), STAGES.

#include "hopper.h"
#include "products.h"

constexpr int WARPS = 16;                        // that multiply, each one block of a stage
constexpr int STAGE = WARPS;
constexpr int BLOCK_BYTES = 1024 + 64 * PARTS;
constexpr int STAGE_BYTES = STAGE * BLOCK_BYTES;
constexpr int STEPS = 8 / PARTS;                 // products of 16 channels that share a group
constexpr int COLUMNS = ROWS == 1 ? 1 : 2;       // of a thread's results: rows 2 * (lane % 4) and the next
constexpr int PARTIAL = WARPS * 16 * ROWS;       // floats of one tile's sums

#if BF16
constexpr float UNIT = 0x1p69f;
#else
constexpr float UNIT = 0x1p24f;
#endif

__device__ __forceinline__ void multiply(float (&sums)[4], u32 codes, u32 low, u32 high) {
    const u32 rest = codes >> 8;
    const u32 a[4] = {codes & 0x000F000Fu, codes & 0x00F000F0u, rest & 0x000F000Fu, rest & 0x00F000F0u};
    product_of_warp(sums, a, low, high);
}

// Activations as the matrix units want them: for each 32 channels and each row, four times 16 bytes, one for each
// thread of four. And the sum of each group's.
__device__ __forceinline__ void arrange(const u32* x, uint4* arranged, float* x_sums, int rows, int columns, int thread) {
    const int pieces = columns / 8, all = pieces * ROWS;
    constexpr int AT_ONCE = ROWS < 4 ? ROWS : 4, SHARERS = 16 / PARTS;
    for (int first = 0; first < all; first += AT_ONCE * WARPS * 32) {
        u32 words[AT_ONCE][4];
#pragma unroll
        for (int more = 0; more < AT_ONCE; ++more) {
            const int index = first + more * WARPS * 32 + thread, row = index / pieces, piece = index % pieces;
            const u32* source = x + (row * columns + (piece / 4) * 32) / 2 + piece % 4;
#pragma unroll
            for (int i = 0; i < 4; ++i) words[more][i] = index < all && row < rows ? source[4 * i] : 0;
        }
#pragma unroll
        for (int more = 0; more < AT_ONCE; ++more) {
            const int index = first + more * WARPS * 32 + thread, row = index / pieces, piece = index % pieces;
            float sum = 0;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 pair = widened(words[more][i]);
#if BF16
                words[more][i] = rounded(pair.x * 0x1p64f, pair.y * 0x1p64f);
#endif
                sum += pair.x + pair.y;
            }
#pragma unroll
            for (int other = SHARERS / 2; other; other /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, other);
            if (index < all) {
                arranged[((piece / 4) * ROWS + row) * 4 + piece % 4] =
                    make_uint4(words[more][0], words[more][1], words[more][2], words[more][3]);
                if (piece % SHARERS == 0) x_sums[(piece / SHARERS) * ROWS + row] = sum * (1 / UNIT);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(32 * (WARPS + 1), 2)
few_rows(const unsigned char* blocks, const u32* x, unsigned short* out, long long rows, long long out_features, long long in_features) {
    extern __shared__ __align__(128) unsigned char shared[];
    const int across = static_cast<int>(in_features) / 128;   // blocks of a tile
    const int stages_of_tile = (across + STAGE - 1) / STAGE;
    const int tiles = static_cast<int>(out_features) / 16;
    const int first_tile = static_cast<int>(static_cast<long long>(blockIdx.x) * tiles / gridDim.x);
    const int end_tile = static_cast<int>(static_cast<long long>(blockIdx.x + 1) * tiles / gridDim.x);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    const u32 stage_at = shared_address(shared);
    const u32 full = stage_at + STAGES * STAGE_BYTES, empty = full + 8 * STAGES;
    uint4* arranged = reinterpret_cast<uint4*>(shared + STAGES * (STAGE_BYTES + 16));
    float* x_sums = reinterpret_cast<float*>(arranged + static_cast<int>(in_features) / 8 * ROWS);
    float* partial = x_sums + across * PARTS * ROWS;

    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(full + 8 * i, 1);
            barrier_init(empty + 8 * i, WARPS);
        }
        barrier_fence();
    }
    __syncthreads();
    launch_next();

    if (warp == WARPS) {
        if (lane == 0) {
            int stage = 0;
            u32 parity = 1;
            for (int tile = first_tile; tile < end_tile; ++tile) {
                const unsigned char* source = blocks + static_cast<u64>(tile) * across * BLOCK_BYTES;
                for (int first = 0; first < across; first += STAGE) {
                    const u32 bytes = min(STAGE, across - first) * BLOCK_BYTES;
                    barrier_wait(empty + 8 * stage, parity);
                    barrier_expect(full + 8 * stage, bytes);
                    copy_bulk(stage_at + stage * STAGE_BYTES, source + static_cast<u64>(first) * BLOCK_BYTES, bytes,
                              full + 8 * stage);
                    if (++stage == STAGES) {
                        stage = 0;
                        parity ^= 1;
                    }
                }
            }
        }
        return;
    }

    launch_wait();
    arrange(x, arranged, x_sums, static_cast<int>(rows), static_cast<int>(in_features), threadIdx.x);
    threads_meet<32 * WARPS>(1);

    const int g = lane / 4, t = lane % 4;
    const u32 x_at = shared_address(arranged) + ((g % ROWS) * 4 + t) * 16;
    int stage = 0;
    u32 parity = 0;
    for (int tile = first_tile; tile < end_tile; ++tile) {
        float totals[2 * COLUMNS] = {};
        for (int at_stage = 0; at_stage < stages_of_tile; ++at_stage) {
            barrier_wait(full + 8 * stage, parity);
            const int block = at_stage * STAGE + warp;
            if (block < across) {
                const u32 at = stage_at + stage * STAGE_BYTES + warp * BLOCK_BYTES;
                const uint4 codes[2] = {shared_load16(at + lane * 16), shared_load16(at + 512 + lane * 16)};
                const u32* words = reinterpret_cast<const u32*>(codes);
                uint4 inputs[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) inputs[i] = shared_load16(x_at + (block * 4 + i) * (ROWS * 64));
#pragma unroll
                for (int part = 0; part < PARTS; ++part) {
                    // Sums of their own, so that a product need not wait for the one before it.
                    constexpr int CHAINS = STEPS == 8 ? 4 : 2;
                    float sums[CHAINS][4] = {};
#pragma unroll
                    for (int step = 0; step < STEPS; ++step) {
                        const int i = part * STEPS + step;
                        const uint4 both = inputs[i / 2];
                        multiply(sums[step % CHAINS], words[i], i % 2 ? both.z : both.x, i % 2 ? both.w : both.y);
                    }
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const u32 pair = shared_load4(at + 1024 + part * 64 + (g + 8 * half) * 4);
#pragma unroll
                        for (int column = 0; column < COLUMNS; ++column) {
                            float sum = 0;
#pragma unroll
                            for (int chain = 0; chain < CHAINS; ++chain) sum += sums[chain][2 * half + column];
                            const float x_sum = x_sums[(block * PARTS + part) * ROWS + (2 * t + column) % ROWS];
                            const float centred = sum * (half ? 0.0625f : 1.0f) - zero_of(pair) * x_sum;
                            totals[half * COLUMNS + column] += scale_of(pair) * centred;
                        }
                    }
                }
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(empty + 8 * stage);
            if (++stage == STAGES) {
                stage = 0;
                parity ^= 1;
            }
        }
        float* mine = partial + (tile & 1) * PARTIAL;
        if (2 * t < ROWS) {
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int column = 0; column < COLUMNS; ++column)
                    mine[warp * 16 * ROWS + (2 * t + column) * 16 + g + 8 * half] = totals[half * COLUMNS + column];
        }
        threads_meet<32 * WARPS>(1);
        if (threadIdx.x < 16 * ROWS) {
            float sum = 0;
#pragma unroll
            for (int other = 0; other < WARPS; ++other) sum += mine[other * 16 * ROWS + threadIdx.x];
            const int row = threadIdx.x / 16;
            if (row < rows)
                out[static_cast<u64>(row) * out_features + tile * 16 + threadIdx.x % 16] =
                    static_cast<unsigned short>(rounded(sum * UNIT, 0));
        }
    }
}

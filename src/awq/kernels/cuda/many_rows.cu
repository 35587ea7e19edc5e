// A product of many rows on Hopper's matrix units, with the weight unpacked while they multiply.
//
// A thread of the last four warps has the copy engine bring activations. The other warps multiply, four together 64
// output channels by ROWS rows; each brings its own blocks of the weight. While some wait for their products the others
// unpack. Sums of a group are scaled in float32. Code - zero is exact in the activations' type, so no weight is
// rounded.
//
// The steps of all tiles, 128 input channels each, are shared out equally among the programs. Where several share a
// tile, sums are written down and added in a fixed order by the last one to arrive: the same inputs give the same
// bits.
//
// Blocks are those of few_rows.cu. Constants: BF16, ROWS (8, 16, 32, 64 or 128), GROUPS (of warps that multiply: up to 4
// for 32 rows, 3 for 64, else 2), PARTS (groups of the weight in a block), STAGES (of activations), DEPTH (blocks that a
// warp has under way or in use).

#include "hopper.h"
#include "products.h"

constexpr int TILE = 64 * GROUPS;                // output channels
constexpr int BLOCK_BYTES = 1024 + 64 * PARTS;
constexpr int X_BYTES = ROWS * 256;
constexpr int STEPS = 8 / PARTS;
constexpr int MULTIPLYING = 128 * GROUPS, PROGRAM = MULTIPLYING + 128;
// Two operands, so that one is unpacked while the other is multiplied; with more groups the others do it meanwhile.
constexpr int OPERANDS = GROUPS == 2 ? 2 : 1;
constexpr int TURNS = PARTS == 1 ? OPERANDS : PARTS;
// Registers of a thread that copies and of one that multiplies: no more than the threads begin with.
constexpr int COPYING_REGISTERS = GROUPS == 2 ? 40 : 32, REGISTERS = GROUPS == 2 ? 232 : GROUPS == 3 ? 160 : 112;

// Codes are subnormal numbers where they lie; times 2 ** 127 or 2 ** 15 they are as many times UNIT.
#if BF16
constexpr u32 RAISE = 0x7F007F00u, RAISE_16 = 0x7D007D00u;
constexpr float UNIT = 0x1p-6f;
#else
constexpr u32 RAISE = 0x78007800u, RAISE_16 = 0x68006800u;
constexpr float UNIT = 0x1p-9f;
#endif

// UNIT * (code - zero) of eight codes: an operand of 16 output by 16 input channels.
__device__ __forceinline__ void unpack(u32 (&a)[4], u32 codes, u32 upper, u32 lower) {
    const u32 rest = codes >> 8;
    a[0] = multiplied_and_added(codes & 0x000F000Fu, RAISE, upper);
    a[1] = multiplied_and_added(codes & 0x00F000F0u, RAISE_16, lower);
    a[2] = multiplied_and_added(rest & 0x000F000Fu, RAISE, upper);
    a[3] = multiplied_and_added(rest & 0x00F000F0u, RAISE_16, lower);
}

// What a program does of all steps: from `first` to before `end`.
struct Share {
    int first, end;
};

__device__ __forceinline__ int first_of(int program, int steps) {
    return static_cast<int>(static_cast<long long>(program) * steps / gridDim.x);
}

// The last program whose share begins at `step` or before.
__device__ __forceinline__ int program_of(int step, int steps) {
    return static_cast<int>((static_cast<long long>(step + 1) * gridDim.x - 1) / steps);
}

struct Measures {
    const unsigned char* blocks;
    unsigned short* out;
    float* partial;
    int* counters;
    int rows, out_features;
    int across, tiles_of_rows;  // steps of a tile, tiles for the same output channels

    __device__ int first_channel(int tile) const { return tile / tiles_of_rows * TILE; }
    __device__ int first_row(int tile) const { return (tile % tiles_of_rows) * ROWS; }
};

struct Stages {
    u32 x, full, empty;

    __device__ u32 x_at(int stage) const { return x + stage * X_BYTES; }
};

__device__ __forceinline__ void bring_rows(const Measures& m, const Stages& s, Share share, const Map& x) {
    int tile = share.first / m.across, block = share.first % m.across, stage = 0;
    u32 parity = 1;
    launch_wait();
    for (int step = share.first; step < share.end; ++step) {
        const u32 full = s.full + 8 * stage, target = s.x_at(stage);
        barrier_wait(s.empty + 8 * stage, parity);
        barrier_expect(full, X_BYTES);
        copy_box(target, x, block * 128, m.first_row(tile), full);
        copy_box(target + X_BYTES / 2, x, block * 128 + 64, m.first_row(tile), full);
        if (++block == m.across) {
            block = 0;
            ++tile;
        }
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
}

struct Scales {
    float upper, lower;
};

// Sums of 64 output channels by ROWS rows, as a warpgroup's threads hold them.
using Sums = float[ROWS / 2];

__device__ __forceinline__ void add(Sums& totals, const Sums& sums, Scales scales) {
#pragma unroll
    for (int i = 0; i < ROWS / 2; ++i) totals[i] += sums[i] * (i % 4 < 2 ? scales.upper : scales.lower);
}

// A warp's own blocks of the weight: those of its 16 output channels, step by step.
struct Blocks {
    u32 at, slot;                // shared memory of DEPTH blocks; the one that is read next
    int step, end, block;        // that is brought next
    const unsigned char* source;

    __device__ void locate(const Measures& m, int warp) {
        const int tile = step / m.across, channels = m.first_channel(tile) / 16 + warp;
        block = step % m.across;
        source = channels * 16 < m.out_features
                     ? m.blocks + (static_cast<u64>(channels) * m.across + block) * BLOCK_BYTES : nullptr;
    }

    __device__ void bring(const Measures& m, u32 target, int warp, int lane) {
        if (step < end) {
            if (source) {
                copy16(target + lane * 16, source + lane * 16);
                copy16(target + 512 + lane * 16, source + 512 + lane * 16);
                if (lane < 4 * PARTS) copy16(target + 1024 + lane * 16, source + 1024 + lane * 16);
                source += BLOCK_BYTES;
            }
            ++step;
            if (++block == m.across) locate(m, warp);
        }
        copies_commit();
    }

    __device__ void begin(const Measures& m, Share share, u32 shared, int warp, int lane) {
        at = shared + warp * DEPTH * BLOCK_BYTES;
        slot = 0;
        step = share.first;
        end = share.end;
        locate(m, warp);
        for (int i = 0; i < DEPTH - 1; ++i) bring(m, at + i * BLOCK_BYTES, warp, lane);
    }

    // The address of the next block, which has arrived; the one before it is done with, and another takes its place.
    __device__ u32 next(const Measures& m, int warp, int lane) {
        copies_wait<DEPTH - 2>();
        __syncwarp();
        const u32 found = at + slot * BLOCK_BYTES;
        bring(m, at + (slot == 0 ? DEPTH - 1 : slot - 1) * BLOCK_BYTES, warp, lane);
        slot = slot + 1 == DEPTH ? 0 : slot + 1;
        return found;
    }
};

// One part of a block, unpacked: STEPS operands, and the scales of this thread's two output channels.
struct Operand {
    u32 a[STEPS][4];
    Scales scales;
};

__device__ __forceinline__ void read(Operand& operand, u32 block, int part, int lane) {
    u32 words[8];
#pragma unroll
    for (int half = 0; half < 2; ++half)
        if (half * 4 < (part + 1) * STEPS && (half + 1) * 4 > part * STEPS) {
            const uint4 found = shared_load16(block + half * 512 + lane * 16);
            words[4 * half] = found.x, words[4 * half + 1] = found.y;
            words[4 * half + 2] = found.z, words[4 * half + 3] = found.w;
        }
    const u32 pairs = block + 1024 + part * 64 + lane / 4 * 4;
    const u32 upper = shared_load4(pairs), lower = shared_load4(pairs + 32);
    operand.scales = {scale_of(upper), scale_of(lower)};
    const float upper_zero = -UNIT * zero_of(upper), lower_zero = -UNIT * zero_of(lower);
    const u32 upper_offset = rounded(upper_zero, upper_zero), lower_offset = rounded(lower_zero, lower_zero);
#pragma unroll
    for (int step = 0; step < STEPS; ++step) unpack(operand.a[step], words[part * STEPS + step], upper_offset, lower_offset);
}

// What products under way read or write is settled here, after their wait: the compiler may move nothing across.
__device__ __forceinline__ void settle(Sums& sums, Operand& operand) {
#pragma unroll
    for (int i = 0; i < ROWS / 2; ++i) settle(sums[i]);
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
#pragma unroll
        for (int i = 0; i < 4; ++i) settle(operand.a[step][i]);
}

__device__ __forceinline__ void start(Sums& sums, const Operand& operand, u32 x, int part) {
    products_begin();
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        const int i = part * STEPS + step;
        product<ROWS>(sums, operand.a[step], rows_described(x + (i / 4) * (ROWS * 128)) + (i % 4) * 2, step > 0);
    }
    products_commit();
}

// Results: 8 x 8 of them at a time are turned, so that a thread stores neighbours.
__device__ __forceinline__ void store(const Measures& m, const Sums& totals, int channel, int first_row, int lane) {
#pragma unroll
    for (int i = 0; i < ROWS / 8; ++i) {
        const int row = first_row + 8 * i + lane / 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const u32 both =
                transposed(rounded(totals[4 * i + 2 * half] * (1 / UNIT), totals[4 * i + 2 * half + 1] * (1 / UNIT)));
            if (row < m.rows)
                *reinterpret_cast<u32*>(m.out + static_cast<u64>(row) * m.out_features + channel + 8 * half +
                                        lane % 4 * 2) = both;
        }
    }
}

// Sums of a program's first tile, or of its last: no more than these are shared.
__device__ __forceinline__ float* partial_of(const Measures& m, int program, bool last, int thread) {
    return m.partial + (static_cast<u64>(program) * 2 + last) * (ROWS / 2) * MULTIPLYING + thread;
}

// A tile of which this program has computed a share, or all: true if `totals` are now all of it.
__device__ __forceinline__ bool complete(const Measures& m, Sums& totals, int tile, int steps, int* last) {
    const int from = tile * m.across, to = from + m.across;
    const int first = program_of(from, steps), end = program_of(to - 1, steps) + 1;
    if (end - first == 1) return true;
    const int thread = threadIdx.x, program = blockIdx.x;
    int* counter = m.counters + tile;
    float* mine = partial_of(m, program, first_of(program, steps) < from, thread);
#pragma unroll
    for (int i = 0; i < ROWS / 2; ++i) __stcg(mine + i * MULTIPLYING, totals[i]);
    threads_meet<MULTIPLYING>(1);
    if (thread == 0) {
        *last = count(counter) == end - first - 1;
        if (*last) *counter = 0;
    }
    threads_meet<MULTIPLYING>(1);
    if (!*last) return false;
#pragma unroll
    for (int i = 0; i < ROWS / 2; ++i) totals[i] = 0;
    constexpr int AT_ONCE = ROWS <= 16 ? 8 : 128 / ROWS;  // programs whose sums are read together
    for (int other = first; other < end; other += AT_ONCE) {
        Sums found[AT_ONCE];
#pragma unroll
        for (int more = 0; more < AT_ONCE; ++more) {
            const int whose = other + more;
            const float* sums = partial_of(m, whose, first_of(whose, steps) < from, thread);
#pragma unroll
            for (int i = 0; i < ROWS / 2; ++i) found[more][i] = whose < end ? __ldcg(sums + i * MULTIPLYING) : 0;
        }
#pragma unroll
        for (int more = 0; more < AT_ONCE; ++more)
#pragma unroll
            for (int i = 0; i < ROWS / 2; ++i) totals[i] += found[more][i];
    }
    return true;
}

__device__ __forceinline__ void multiply(const Measures& m, const Stages& s, Share share, int steps, u32 codes, int* last) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Blocks blocks;
    blocks.begin(m, share, codes, warp, lane);
    launch_wait();
    Sums totals;
    int stage = 0;
    u32 parity = 0, block = 0;
    int step = share.first;
    while (step < share.end) {
        const int tile = step / m.across, end = min(share.end, (tile + 1) * m.across);
#pragma unroll
        for (int i = 0; i < ROWS / 2; ++i) totals[i] = 0;
        // Nothing is under way where a turn begins: the compiler waits after each product otherwise.
        Sums sums;
        Operand operands[OPERANDS];
        if (OPERANDS == 2) {
            block = blocks.next(m, warp, lane);
            read(operands[0], block, 0, lane);
        }
        while (step < end) {
#pragma unroll
            for (int turn = 0; turn < TURNS; ++turn) {
                if (step < end) {
                    const int part = turn % PARTS;
                    Operand& current = operands[turn % OPERANDS];
                    if (OPERANDS == 1) {
                        if (part == 0) block = blocks.next(m, warp, lane);
                        read(current, block, part, lane);
                    }
                    if (part == 0) barrier_wait(s.full + 8 * stage, parity);
                    start(sums, current, s.x_at(stage), part);
                    if (OPERANDS == 2) {
                        Operand& next = operands[(turn + 1) % OPERANDS];
                        if (part + 1 < PARTS) {
                            read(next, block, part + 1, lane);
                        } else if (step + 1 < end) {
                            block = blocks.next(m, warp, lane);
                            read(next, block, 0, lane);
                        }
                    }
                    products_wait<0>();
                    settle(sums, current);
                    if (part + 1 == PARTS) {
                        if (lane == 0) barrier_arrive(s.empty + 8 * stage);
                        if (++stage == STAGES) {
                            stage = 0;
                            parity ^= 1;
                        }
                        ++step;
                    }
                    add(totals, sums, current.scales);
                }
            }
        }
        if (complete(m, totals, tile, steps, last)) {
            const int channel = m.first_channel(tile) + warp * 16;
            if (channel < m.out_features) store(m, totals, channel, m.first_row(tile), lane);
        }
    }
}

extern "C" __global__ void __launch_bounds__(PROGRAM, 1)
many_rows(const __grid_constant__ Map x, const unsigned char* blocks, unsigned short* out, float* partial, int* counters,
          long long rows, long long out_features, long long in_features) {
    extern __shared__ __align__(1024) unsigned char shared[];
    __shared__ __align__(8) u64 barriers[2 * STAGES];
    __shared__ int last;
    const int across = static_cast<int>(in_features) / 128;
    const int tiles_of_rows = (static_cast<int>(rows) + ROWS - 1) / ROWS;
    const Measures m = {blocks, out, partial, counters, static_cast<int>(rows), static_cast<int>(out_features), across,
                        tiles_of_rows};
    const int steps = (m.out_features + TILE - 1) / TILE * tiles_of_rows * across;
    const Share share = {first_of(blockIdx.x, steps), first_of(blockIdx.x + 1, steps)};
    const u32 x_at = (shared_address(shared) + 1023) & ~1023u;
    const Stages s = {x_at, shared_address(barriers), shared_address(barriers + STAGES)};
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(s.full + 8 * i, 1);
            barrier_init(s.empty + 8 * i, MULTIPLYING / 32);
        }
        barrier_fence();
    }
    __syncthreads();
    launch_next();
    if (threadIdx.x >= MULTIPLYING) {
        fewer_registers<COPYING_REGISTERS>();
        if (threadIdx.x == MULTIPLYING) bring_rows(m, s, share, x);
    } else {
        more_registers<REGISTERS>();
        multiply(m, s, share, steps, x_at + STAGES * X_BYTES, &last);
    }
}

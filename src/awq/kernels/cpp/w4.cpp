// Products of activations with weights of 2 to 8 bits, in whole numbers.
//
// Processors multiply bytes several times faster than floats. So each row of activations is written, chunk by
// chunk of at most 128 input channels, as scale * (d0 + 256 d1 + 65536 d2) with signed bytes d ("digits"):
// three digits are as good as float32, two hold bfloat16 and float16 exactly but for values far below the
// largest of their chunk, one is an 8-bit approximation. Sums of codes times digits are exact, so a row's
// result depends neither on the rows beside it, nor on the number of threads, nor on the instruction set.
//
// Codes lie in blocks of 64 output channels, [blocks][in / 8][64 outputs][4 bytes]: byte b of an output holds
// input channels ORDER[b] (low nibble) and ORDER[4 + b] (high nibble) of the eight, so that masking a vector
// gives the four channels of one `dot`. Scales and zero points are [groups][outputs].
//
// Codes of more than 4 bits lie in two planes, [blocks][2][in / 8][64 outputs][4 bytes]: their low nibbles, then
// their high ones, which count sixteen times. A byte of theirs costs what a byte of two 4-bit codes does.

#include <cstdlib>
#include <optional>

#include "activations.h"
#include "attention.h"
#include "block.h"
#include "experts.h"
#include "norm.h"
#include "simd.h"
#include "threads.h"
#if defined(__AMX_INT8__)
#include "amx.h"
#endif

namespace {

constexpr int BLOCK = 64;        // output channels
constexpr int ROW = 4 * BLOCK;   // bytes of eight input channels of a block
constexpr int ORDER[8] = {0, 4, 1, 5, 2, 6, 3, 7};
constexpr int MOST_ROWS = 240;   // of a task: its sums, and its activations of a chunk, stay in the cache
constexpr int AHEAD = 4096;      // bytes to ask the memory for in advance
constexpr int FEWEST_ROWS = 32;  // below that, expanding the codes weighs too much

// ---- products ----------------------------------------------------------------------------------------------

// Codes of one chunk of a block, one to a byte: [chunk / 4][64 outputs][4 bytes].
void expand(uint8_t* tile, const uint8_t* codes, int eights) {
    const ivec mask = iset(0x0f0f0f0f);
    for (int e = 0; e < eights; e++) {
        for (int v = 0; v < BLOCK / LANES; v++) {
            const uint8_t* at = codes + e * ROW + v * 4 * LANES;
            fetch(at + AHEAD);
            const ivec word = iload(at);
            istore(tile + 2 * e * ROW + v * 4 * LANES, iand(word, mask));
            istore(tile + (2 * e + 1) * ROW + v * 4 * LANES, iand(right4(word), mask));
        }
    }
}

// Adds a chunk's exact sums, one for each digit, to a vector of `sums`.
template <int D>
inline void settle(float* sums, const ivec* part, fvec by, fvec sum, const float* scales, const float* zeros) {
    fvec total;
    if (D == 1) total = to_float(part[0]);
    if (D == 2) total = to_float(iadd(left8(part[D - 1]), part[0]));
    if (D == 3) {
        const fvec upper = to_float(iadd(left8(part[D - 1]), part[D - 2]));
        total = fma(upper, fset(256), to_float(part[0]));
    }
    total = fnma(fload(zeros), sum, total);
    fstore(sums, fma(total, fmul(fload(scales), by), fload(sums)));
}

// Sums of codes times digits, over four input channels at a time: of each eight first those of the low nibbles,
// then those of the high ones. With TILE, `codes` are expanded.
template <int D, int R, bool TILE>
inline void add_products(
    ivec (&part)[R][VECTORS][D], const uint8_t* codes, const int8_t* x, int n, int from, int to) {
    for (int r = 0; r < R; r++)
        for (int v = 0; v < VECTORS; v++)
            for (int d = 0; d < D; d++) part[r][v][d] = izero();
    const ivec mask = iset(0x0f0f0f0f);
    for (int half = from; half < to; half++) {
        ivec four[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            if (TILE) {
                four[v] = iload(codes + half * ROW + v * 4 * LANES);
            } else {
                const uint8_t* at = codes + (half / 2) * ROW + v * 4 * LANES;
                if (half % 2 == 0) fetch(at + AHEAD);
                const ivec word = iload(at);
                four[v] = iand(half % 2 ? right4(word) : word, mask);
            }
        }
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
#pragma GCC unroll 3
            for (int d = 0; d < D; d++) {
                const ivec digits = ibroadcast(x + (r * D + d) * n + 4 * half);
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++) part[r][v][d] = dot(part[r][v][d], four[v], digits);
            }
        }
    }
}

// One chunk's part of R rows x (VECTORS * LANES) outputs, added to `sums`.
template <int D, int R, bool TILE>
inline void multiply_part(
    float* sums, const uint8_t* codes, const int8_t* x, const float* x_scale, const float* x_sum, int eights,
    const float* scales, const float* zeros) {
    ivec part[R][VECTORS][D];
    const int n = 8 * eights, halves = 2 * eights;
    if (STEPS == 0) {
        add_products<D, R, TILE>(part, codes, x, n, 0, halves);
    } else {
        for (int from = 0; from < halves; from += STEPS) {
            ivec pairs[R][VECTORS][D];
            add_products<D, R, TILE>(pairs, codes, x, n, from, from + STEPS < halves ? from + STEPS : halves);
            for (int r = 0; r < R; r++)
                for (int v = 0; v < VECTORS; v++)
                    for (int d = 0; d < D; d++) {
                        const ivec more = widen(pairs[r][v][d]);
                        part[r][v][d] = from ? iadd(part[r][v][d], more) : more;
                    }
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
        const fvec by = fset(x_scale[r]), sum = fset(x_sum[r]);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
            settle<D>(sums + r * BLOCK + v * LANES, part[r][v], by, sum, scales + v * LANES, zeros + v * LANES);
    }
}

template <int D, int R, bool TILE>
void multiply_rows(
    float* sums, const uint8_t* codes, const int8_t* x, const float* x_scale, const float* x_sum, int eights,
    const float* scales, const float* zeros) {
    for (int at = 0; at < BLOCK; at += VECTORS * LANES)
        multiply_part<D, R, TILE>(
            sums + at, codes + 4 * at, x, x_scale, x_sum, eights, scales + at, zeros + at);
}

template <int D, bool TILE>
void multiply_any(
    int rows, float* sums, const uint8_t* codes, const int8_t* x, const float* x_scale, const float* x_sum,
    int eights, const float* scales, const float* zeros) {
#define ROWS(R)                                                                                             \
    if constexpr (R * D <= 6)                                                                               \
        if (rows == R)                                                                                      \
            return multiply_rows<D, R, TILE>(sums, codes, x, x_scale, x_sum, eights, scales, zeros);
    ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6)
#undef ROWS
}

// Scales and zero points of a block's group in a plane as floats; outputs that do not exist get 0.
void read_group(const Call& call, int64_t block, int64_t g, int plane, float* scales, float* zeros) {
    const int64_t at = g * call.outputs + block * BLOCK;
    const int64_t left = call.outputs - block * BLOCK;
    const int width = call.scale_kind == FLOAT32 ? 4 : 2;
    const uint8_t* from_scales = static_cast<const uint8_t*>(call.scales) + at * width;
    const uint8_t* from_zeros = call.zeros + at;
    uint8_t last_scales[4 * BLOCK] = {}, last_zeros[BLOCK] = {};
    if (left < BLOCK) {
        from_scales = static_cast<const uint8_t*>(std::memcpy(last_scales, from_scales, left * width));
        from_zeros = static_cast<const uint8_t*>(std::memcpy(last_zeros, from_zeros, left));
    }
    read(scales, from_scales, 0, call.scale_kind, BLOCK);
    for (int i = 0; i < BLOCK; i++) zeros[i] = float(from_zeros[i] >> 4 * plane & 15);
    if (plane == 1)
        for (int i = 0; i < BLOCK; i++) scales[i] *= 16;
}

#if defined(__AMX_INT8__)

#ifndef TILED_ROWS
#define TILED_ROWS 8  // from here on tiles are faster
#endif

// One chunk's part of any number of rows, added to `sums`; `tile` holds the expanded codes.
template <int D>
void multiply_tiled(
    const Tiles& tiles, int rows, float* sums, const uint8_t* tile, const int8_t* x, const float* x_scale,
    const float* x_sum, int chunk, const float* scales, const float* zeros) {
    constexpr int ROWS = UNIT / D;
    alignas(64) int32_t parts[2][UNIT * UNIT];
    int64_t done = -1;  // the unit whose sums wait
    const auto settle_done = [&] {
        if (done < 0) return;
        const int first = int(done / 2) * ROWS, at = int(done % 2) * UNIT;
        const int n = rows - first < ROWS ? rows - first : ROWS;
        const int32_t* part = parts[done % 2];
        for (int r = 0; r < n; r++) {
            const fvec by = fset(x_scale[first + r]), sum = fset(x_sum[first + r]);
            for (int v = 0; v < UNIT; v += LANES) {
                ivec digits[D];
                for (int d = 0; d < D; d++) digits[d] = iload(part + (r * D + d) * UNIT + v);
                settle<D>(
                    sums + (first + r) * BLOCK + at + v, digits, by, sum, scales + at + v, zeros + at + v);
            }
        }
    };
    const int64_t units = 2 * ((rows + ROWS - 1) / ROWS);
    for (int64_t u = 0; u < units; u++) {
        const int8_t* digits = x + (u / 2) * ROWS * D * chunk;
        tiles.multiply(parts[u % 2], digits, chunk, tile + (u % 2) * 4 * UNIT, ROW, settle_done);
        done = u;
    }
    settle_done();
}

#endif

// One block of outputs for `rows` rows from `first` on.
template <int D>
void multiply_block(const Call& call, int64_t block, int64_t first, int rows) {
    constexpr int MOST = 6 / D;
    alignas(64) float sums[MOST_ROWS * BLOCK];
    alignas(64) float scales[BLOCK], zeros[BLOCK];
    alignas(64) uint8_t tile[CHUNK * BLOCK];
    std::memset(sums, 0, sizeof(float) * rows * BLOCK);
    const int eights = call.chunk / 8;
    const int parts = (rows + MOST - 1) / MOST;
    const uint8_t* codes = call.codes + block * call.planes * (call.columns / 8) * ROW;
#if defined(__AMX_INT8__)
    std::optional<Tiles> tiles;
    if (rows >= TILED_ROWS) tiles.emplace(call.chunk);
#endif
    const int64_t group_chunks = call.group / call.chunk;
    for (int64_t i = 0; i < call.planes * call.chunks; i++, codes += eights * ROW) {
        const int64_t c = i % call.chunks;
        if (c % group_chunks == 0)
            read_group(call, block, c / group_chunks, int(i / call.chunks), scales, zeros);
        const int64_t at = c * call.rows + first;
        const int8_t* x = call.digits + at * D * call.chunk;
        if (parts == 1) {  // the weights are used once: they need not be expanded first
            multiply_any<D, false>(
                rows, sums, codes, x, call.x_scale + at, call.x_sum + at, eights, scales, zeros);
            continue;
        }
        expand(tile, codes, eights);
#if defined(__AMX_INT8__)
        if (tiles) {
            multiply_tiled<D>(
                *tiles, rows, sums, tile, x, call.x_scale + at, call.x_sum + at, call.chunk, scales, zeros);
            continue;
        }
#endif
        for (int p = 0; p < parts; p++) {
            const int from = rows * p / parts, to = rows * (p + 1) / parts;
            multiply_any<D, true>(
                to - from, sums + from * BLOCK, tile, x + from * D * call.chunk, call.x_scale + at + from,
                call.x_sum + at + from, eights, scales, zeros);
        }
    }
    const int64_t left = call.outputs - block * BLOCK;
    for (int r = 0; r < rows; r++)
        write(
            call.out, (first + r) * call.outputs + block * BLOCK, sums + r * BLOCK, call.x_kind,
            left < BLOCK ? int(left) : BLOCK);
}

template <int D>
void multiply(const Call& call, int threads) {
    const bool small = call.rows * call.columns < 32768;
    parallel(small ? 1 : threads, call.rows, [&](int64_t row) {
        for (int64_t c = 0; c < call.chunks; c++) pack_chunk<D>(call, row, c);
    });
    const int64_t blocks = (call.outputs + BLOCK - 1) / BLOCK;
    int64_t pieces = (call.rows + MOST_ROWS - 1) / MOST_ROWS;
    while (blocks * pieces < 2 * threads && call.rows / (pieces + 1) >= FEWEST_ROWS) pieces++;
    if (call.rows * call.columns * call.outputs < 100000) threads = 1;
    parallel(threads, blocks * pieces, [&](int64_t task) {
        const int64_t piece = task % pieces;
        const int64_t from = call.rows * piece / pieces, to = call.rows * (piece + 1) / pieces;
        multiply_block<D>(call, task / pieces, from, int(to - from));
    });
}

int chunk_of(int64_t group) {
    int chunk = 8;
    for (int n = 16; n <= CHUNK && n <= group; n += 8)
        if (group % n == 0) chunk = n;
    return chunk;
}

}  // namespace

extern "C" {

// 0, or 1 when the system does not let this process use what the library was compiled for.
int openawq_start(void* parallel_function) {
    pool = reinterpret_cast<Parallel>(parallel_function);
#if defined(__AMX_INT8__)
    return may_use_tiles() ? 0 : 1;
#else
    return 0;
#endif
}

// out [rows, outputs] = x [rows, columns] times the weight; 0, or 1 when there is no memory for it.
int openawq_w4(
    const void* x, int64_t x_stride, int x_kind, int64_t rows, int64_t columns, int64_t outputs,
    const void* codes, const void* scales, int scale_kind, const void* zeros, int64_t group, int planes,
    void* out, int digits, int threads) {
    Call call{x, x_stride, Kind(x_kind), rows, columns, outputs, static_cast<const uint8_t*>(codes),
              scales, Kind(scale_kind), static_cast<const uint8_t*>(zeros), group, planes, out,
              chunk_of(group), 0, nullptr, nullptr, nullptr};
    call.chunks = columns / call.chunk;
    const size_t bytes = size_t(rows) * size_t(columns) * size_t(digits);
    const size_t floats = size_t(rows) * size_t(call.chunks);
    // Some more, because tiles read whole units of rows.
    void* memory = std::malloc(bytes + 8 * floats + 64 * CHUNK);
    if (memory == nullptr) return 1;
    call.x_scale = static_cast<float*>(memory);
    call.x_sum = call.x_scale + floats;
    call.digits = reinterpret_cast<int8_t*>(call.x_sum + floats);
    if (digits == 1) multiply<1>(call, threads);
    if (digits == 2) multiply<2>(call, threads);
    if (digits == 3) multiply<3>(call, threads);
    std::free(memory);
    return 0;
}

// Codes uint8 [outputs, columns] to and from the blocks.
void openawq_pack(
    const uint8_t* codes, int64_t outputs, int64_t columns, int planes, uint8_t* packed, int threads) {
    const int64_t eights = columns / 8;
    parallel(threads, (outputs + BLOCK - 1) / BLOCK * planes, [&](int64_t part) {
        const int64_t block = part / planes;
        const int shift = 4 * int(part % planes);
        uint8_t* to = packed + part * eights * ROW;
        for (int64_t e = 0; e < eights; e++)
            for (int n = 0; n < BLOCK; n++, to += 4) {
                const int64_t output = block * BLOCK + n;
                const uint8_t* from = codes + output * columns + 8 * e;
                for (int b = 0; b < 4; b++) {
                    const auto nibble = [&](int i) { return from[ORDER[i]] >> shift & 15; };
                    to[b] = output < outputs ? uint8_t(nibble(b) | nibble(4 + b) << 4) : 0;
                }
            }
    });
}

void openawq_unpack(
    const uint8_t* packed, int64_t outputs, int64_t columns, int planes, uint8_t* codes, int threads) {
    const int64_t eights = columns / 8;
    parallel(threads, (outputs + BLOCK - 1) / BLOCK, [&](int64_t block) {
        const int64_t left = outputs - block * BLOCK;
        const int64_t n = left < BLOCK ? left : BLOCK;
        for (int64_t i = 0; i < n; i++)
            for (int64_t e = 0; e < planes * eights; e++) {
                const uint8_t* from = packed + (block * planes * eights + e) * ROW + 4 * i;
                uint8_t* to = codes + (block * BLOCK + i) * columns + 8 * (e % eights);
                const bool low = e < eights;
                for (int b = 0; b < 4; b++) {
                    to[ORDER[b]] = uint8_t(low ? from[b] & 15 : to[ORDER[b]] | from[b] << 4);
                    to[ORDER[4 + b]] = uint8_t(low ? from[b] >> 4 : to[ORDER[4 + b]] | (from[b] & 0xf0));
                }
            }
    });
}

// out [rows, columns] = x over the root of its mean square, times the weight; see norm.h.
void openawq_norm(
    const void* x, int kind, int64_t rows, int64_t columns, const void* weight, int weight_kind, float offset,
    float epsilon, int rounds, void* out, int threads) {
    const Norm norm{x, Kind(kind), rows, columns, weight, Kind(weight_kind), offset, epsilon, rounds != 0, out};
    parallel(rows * columns < 32768 ? 1 : threads, rows, [&](int64_t row) { normalize(norm, row); });
}

// out [batch, heads, size] = attention of one token; 0, or 1 when there is no memory for it. Strides, in
// elements, are those of batch and head of the query; of batch, head and position of keys, then of values; and of
// batch and position of the mask, which may be null.
int openawq_attend(
    const void* query, const void* keys, const void* values, int kind, const void* mask, const int64_t* strides,
    int64_t batch, int64_t heads, int64_t shared, int64_t length, int64_t size, float scale, void* out,
    int threads) {
    const Attention call{query, keys, values, Kind(kind), static_cast<const uint8_t*>(mask), strides,
                         heads, shared, length, size, scale, out};
    const int64_t tasks = batch * (heads / shared), floats = floats_of(call);
    float* memory = static_cast<float*>(std::malloc(sizeof(float) * size_t(tasks * floats)));
    if (memory == nullptr) return 1;
    if (batch * heads * length * size < 200000) threads = 1;
    parallel(threads, tasks, [&](int64_t task) { attend(call, task, memory + task * floats); });
    std::free(memory);
    return 0;
}

// Turns one token's hidden states into those behind a block, and adds its keys and values to the cache; see
// block.h. 0, or 1 when there is no memory for it.
int openawq_block(const Block* block, const Token* token, int threads) {
    return through(*block, *token, threads);
}

// A layer of experts for tokens that are sent to some of them; see experts.h. 0, or 1 when there is no memory.
int openawq_experts(const Expert* experts, const Routed* routed, int threads) {
    return through_experts(experts, *routed, threads);
}
}

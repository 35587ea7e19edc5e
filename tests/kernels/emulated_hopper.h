// CUDA's words, and the functions of `hopper.h` and `products.h`, for a program that runs on any processor.
//
// Stands in for both headers, so that the programs themselves are compiled unchanged. What the functions do is in
// `emulated_hopper.cpp`.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

using u32 = unsigned int;
using u64 = unsigned long long;

// CUDA's words ----------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// Inside a function this is static; unlike `static` it may follow `extern`. All threads here are one of the system's.
#define __shared__ thread_local

struct alignas(16) uint4 {
    u32 x, y, z, w;
};
struct float2 {
    float x, y;
};
struct Index {
    u32 x;
};
extern Index threadIdx, blockIdx, gridDim;

inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline int min(int a, int b) { return a < b ? a : b; }
inline float __ldcg(const float* source) { return *source; }
inline void __stcg(float* target, float value) { *target = value; }
void __syncthreads();
void __syncwarp();
float __shfl_xor_sync(u32 mask, float value, int other);

// What a launch is ------------------------------------------------------------------------------------------

namespace emulated {

struct Range {
    unsigned char* start;
    u64 bytes;
};

// Programs run one after another. The order of programs, threads and copies is their own where `order` is 0, backwards
// where it is 1, else shuffled. The launch ahead ends as late as can be where `order` is 0, else it has ended: before
// that `inputs` do not hold what they should, and `written` must not change. `weight` may be read ahead.
struct Launch {
    u64 programs, threads, shared, order;
    Range inputs, weight, written[3];
};

using Body = void (*)(void**);

// What went wrong; null if nothing.
const char* start(const Launch& launch, Body body, void** arguments, bool bfloat16);

template <class... P, std::size_t... I>
void call(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<P*>(arguments[I])...);
}

template <class... P>
void call(void (*kernel)(P...), void** arguments) {
    call(kernel, arguments, std::index_sequence_for<P...>());
}

void meet(int name, u32 threads);
void copies_wait(int left);
void products_wait(int left);
void product(float* d, int columns, const u32* a, u64 rows, bool keep);

}  // namespace emulated

// Makes a library of a program: `start` takes the addresses of its arguments, as the driver does.
#define EMULATED(kernel)                                                                    \
    static void body(void** arguments) { emulated::call(kernel, arguments); }               \
    extern "C" const char* start(const emulated::Launch& launch, void** arguments) {        \
        return emulated::start(launch, body, arguments, BF16);                              \
    }

// hopper.h --------------------------------------------------------------------------------------------------

// Where the copy engine finds rows of 16-bit floats.
struct Map {
    const unsigned char* start;
    long long rows, columns, box_rows;
};

u32 shared_address(const void* pointer);
void barrier_init(u32 barrier, u32 arrivals);
void barrier_fence();
void barrier_arrive(u32 barrier);
void barrier_expect(u32 barrier, u32 bytes);
void barrier_wait(u32 barrier, u32 parity);
void copy_bulk(u32 target, const void* source, u32 bytes, u32 barrier);
void copy_box(u32 target, const Map& map, int column, int row, u32 barrier);
void copy16(u32 target, const void* source);
void copies_commit();
uint4 shared_load16(u32 address);
u32 shared_load4(u32 address);
void launch_wait();
inline void launch_next() {}
inline int count(int* counter) { return (*counter)++; }
inline void settle(float&) {}
inline void settle(u32&) {}
u32 rounded(float low, float high);
u32 multiplied_and_added(u32 value, u32 factor, u32 summand);
u32 transposed(u32 both);
float2 widened(u32 both);

template <int THREADS>
void threads_meet(int name) {
    emulated::meet(name, THREADS);
}

template <int LEFT>
void copies_wait() {
    emulated::copies_wait(LEFT);
}

template <int COUNT>
void fewer_registers() {}

template <int COUNT>
void more_registers() {}

inline float scale_of(u32 pair) {
    pair &= ~15u;
    float scale;
    std::memcpy(&scale, &pair, 4);
    return scale;
}

inline float zero_of(u32 pair) { return float(pair & 15u); }

// products.h ------------------------------------------------------------------------------------------------

void product_of_warp(float (&sums)[4], const u32 (&a)[4], u32 low, u32 high);
void products_begin();
void products_commit();

inline u64 rows_described(u32 address) {
    return 1ull << 62 | 1024ull >> 4 << 32 | 1ull << 16 | (address & 0x3FFFF) >> 4;
}

template <int LEFT>
void products_wait() {
    emulated::products_wait(LEFT);
}

template <int COLUMNS>
void product(float (&d)[COLUMNS / 2], const u32 (&a)[4], u64 rows, int keep) {
    emulated::product(d, COLUMNS, a, rows, keep);
}

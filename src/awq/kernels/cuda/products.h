// Products on the matrix units: of a warp, and of a group of four.

#pragma once

#include "hopper.h"

#if BF16
#define TYPES "bf16.bf16"
#else
#define TYPES "f16.f16"
#endif

// sums += a * (low, high): 16 output channels, 16 input channels, 8 rows of activations.
__device__ __forceinline__ void product_of_warp(float (&sums)[4], const u32 (&a)[4], u32 low, u32 high) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPES
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(low), "r"(high));
}

// Rows of 64 channels each (128 bytes), whose pieces of 16 bytes are permuted as the copy engine does it: piece i of
// row r lies at i ^ (r % 8). The address must divide by 1024; for later channels of the row their bytes are added.
__device__ __forceinline__ u64 rows_described(u32 address) {
    constexpr u64 PERMUTED = 1ull << 62, EIGHT_ROWS = 1024 >> 4;
    return PERMUTED | (EIGHT_ROWS << 32) | (1ull << 16) | ((address & 0x3FFFF) >> 4);
}

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until no more than LEFT of the groups committed are under way.
template <int LEFT>
__device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D16(i) D4(i), D4(i + 4), D4(i + 8), D4(i + 12)

// d = d * keep + a * rows: 64 output channels, 16 input channels, COLUMNS rows of activations in shared memory.
template <int COLUMNS>
__device__ __forceinline__ void product(float (&d)[COLUMNS / 2], const u32 (&a)[4], u64 rows, int keep);

template <>
__device__ __forceinline__ void product<8>(float (&d)[4], const u32 (&a)[4], u64 rows, int keep) {
    asm volatile(
        "{ .reg .pred keep; setp.ne.b32 keep, %9, 0; "
        "wgmma.mma_async.sync.aligned.m64n8k16.f32." TYPES " "
        "{%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, %8, keep, 1, 1, 0; }"
        : D4(0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(rows), "r"(keep));
}

template <>
__device__ __forceinline__ void product<16>(float (&d)[8], const u32 (&a)[4], u64 rows, int keep) {
    asm volatile(
        "{ .reg .pred keep; setp.ne.b32 keep, %13, 0; "
        "wgmma.mma_async.sync.aligned.m64n16k16.f32." TYPES " "
        "{%0, %1, %2, %3, %4, %5, %6, %7}, "
        "{%8, %9, %10, %11}, %12, keep, 1, 1, 0; }"
        : D4(0), D4(4)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(rows), "r"(keep));
}

template <>
__device__ __forceinline__ void product<32>(float (&d)[16], const u32 (&a)[4], u64 rows, int keep) {
    asm volatile(
        "{ .reg .pred keep; setp.ne.b32 keep, %21, 0; "
        "wgmma.mma_async.sync.aligned.m64n32k16.f32." TYPES " "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
        "{%16, %17, %18, %19}, %20, keep, 1, 1, 0; }"
        : D16(0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(rows), "r"(keep));
}

template <>
__device__ __forceinline__ void product<64>(float (&d)[32], const u32 (&a)[4], u64 rows, int keep) {
    asm volatile(
        "{ .reg .pred keep; setp.ne.b32 keep, %37, 0; "
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPES " "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, keep, 1, 1, 0; }"
        : D16(0), D16(16)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(rows), "r"(keep));
}

template <>
__device__ __forceinline__ void product<128>(float (&d)[64], const u32 (&a)[4], u64 rows, int keep) {
    asm volatile(
        "{ .reg .pred keep; setp.ne.b32 keep, %69, 0; "
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPES " "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
        "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "
        "%62, %63}, "
        "{%64, %65, %66, %67}, %68, keep, 1, 1, 0; }"
        : D16(0), D16(16), D16(32), D16(48)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(rows), "r"(keep));
}


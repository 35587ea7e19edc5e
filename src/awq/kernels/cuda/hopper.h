// Hopper's instructions as functions: barriers in shared memory, bulk copies, launches that begin early, products.
//
// Compiled by NVRTC, which has no standard headers.

#pragma once

using u32 = unsigned int;
using u64 = unsigned long long;

// Barriers -------------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// What was written to barriers becomes visible to the copy engine.
__device__ __forceinline__ void barrier_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// Threads of one named barrier, a multiple of 32.
template <int THREADS>
__device__ __forceinline__ void threads_meet(int name) {
    asm volatile("bar.sync %0, %1;" ::"r"(name), "n"(THREADS) : "memory");
}

// Copies ---------------------------------------------------------------------------------------------------

// A contiguous piece, a multiple of 16 bytes, which is read once: it leaves the cache first.
__device__ __forceinline__ void copy_bulk(u32 target, const void* source, u32 bytes, u32 barrier) {
    constexpr u64 EVICT_FIRST = 0x12F0000000000000ull;
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
            "r"(target),
        "l"(source), "r"(bytes), "r"(barrier), "l"(EVICT_FIRST)
        : "memory");
}

// 16 bytes for this thread's group of copies.
__device__ __forceinline__ void copy16(u32 target, const void* source) {
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
}

__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until no more than LEFT of this thread's groups are under way.
template <int LEFT>
__device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// How a matrix lies in memory, as the driver describes it.
struct alignas(64) Map {
    u64 words[16];
};

// A box of a matrix: its size and arrangement are the map's; what lies outside of the matrix is zero.
__device__ __forceinline__ void copy_box(u32 target, const Map& map, int column, int row, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
            "r"(target),
        "l"(&map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}

__device__ __forceinline__ uint4 shared_load16(u32 address) {
    uint4 found;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(found.x), "=r"(found.y), "=r"(found.z), "=r"(found.w)
                 : "r"(address));
    return found;
}

__device__ __forceinline__ u32 shared_load4(u32 address) {
    u32 found;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(found) : "r"(address));
    return found;
}

// Launches -------------------------------------------------------------------------------------------------

// The launch ahead has ended, and all it wrote can be read.
__device__ __forceinline__ void launch_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// The next launch may begin, up to its own launch_wait().
__device__ __forceinline__ void launch_next() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Counts on from all that this block of threads has written so far to all that is read behind it, on the whole GPU.
__device__ __forceinline__ int count(int* counter) {
    int before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}

// Registers of each thread, for all four warps of a group.
template <int COUNT>
__device__ __forceinline__ void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
__device__ __forceinline__ void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// The compiler may move no use of a value across this.
__device__ __forceinline__ void settle(float& value) { asm volatile("" : "+f"(value)::"memory"); }

__device__ __forceinline__ void settle(u32& value) { asm volatile("" : "+r"(value)::"memory"); }

// Numbers --------------------------------------------------------------------------------------------------

// A scale and a zero point in one word: the bits of a float, of which the lowest four are the zero point.
__device__ __forceinline__ float scale_of(u32 pair) { return __uint_as_float(pair & ~15u); }

__device__ __forceinline__ float zero_of(u32 pair) { return static_cast<float>(pair & 15u); }

// Two floats rounded to the activations' type; `low` in the lower half.
__device__ __forceinline__ u32 rounded(float low, float high) {
    u32 both;
#if BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#endif
    return both;
}

// Both halves: value * factor + summand, rounded once.
__device__ __forceinline__ u32 multiplied_and_added(u32 value, u32 factor, u32 summand) {
    u32 both;
#if BF16
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(both) : "r"(value), "r"(factor), "r"(summand));
#else
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(both) : "r"(value), "r"(factor), "r"(summand));
#endif
    return both;
}

// A matrix of 8 x 8 halves, of which thread 4 r + c of a warp holds columns 2 c and 2 c + 1 of row r, transposed.
__device__ __forceinline__ u32 transposed(u32 both) {
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(both));
    return both;
}

// The two halves of a word of activations.
__device__ __forceinline__ float2 widened(u32 both) {
    float2 found;
#if BF16
    found.x = __uint_as_float(both << 16);
    found.y = __uint_as_float(both & 0xFFFF0000u);
#else
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
        : "=f"(found.x), "=f"(found.y)
        : "r"(both));
#endif
    return found;
}

// Loops over tasks on PyTorch's threads.
#pragma once

#include <atomic>
#include <cstdint>

// PyTorch's own pool: another one beside it would fight for the cores. The signature is that of GOMP_parallel,
// which GNU's, LLVM's and Intel's OpenMP libraries all have.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
static Parallel pool = nullptr;

template <class F>
struct Loop {
    const F& body;
    int64_t count;
    std::atomic<int64_t> next{0};
    static void run(void* self) {
        Loop& loop = *static_cast<Loop*>(self);
        for (int64_t i; (i = loop.next.fetch_add(1)) < loop.count;) loop.body(i);
    }
};

template <class F>
void parallel(int threads, int64_t count, const F& body) {
    Loop<F> loop{body, count};
    if (threads > count) threads = int(count);
    if (threads > 1 && pool != nullptr)
        pool(&Loop<F>::run, &loop, unsigned(threads), 0);
    else
        Loop<F>::run(&loop);
}

// The product of a layer as a step of something larger, and sums of its results.
#pragma once

#include "numbers.h"

struct Product {
    const void *codes, *scales, *zeros;
    const void* bias;  // of the activations' kind, or null
    int64_t columns, outputs, group;
    int32_t scale_kind, planes;
};

extern "C" int openawq_w4(
    const void* x, int64_t x_stride, int x_kind, int64_t rows, int64_t columns, int64_t outputs,
    const void* codes, const void* scales, int scale_kind, const void* zeros, int64_t group, int planes,
    void* out, int digits, int threads);

namespace {

// How activations are read, and on how many threads.
struct How {
    Kind kind;
    int digits, threads;

    int64_t width() const { return kind == FLOAT32 ? 4 : 2; }
};

// Hands out a piece of memory in parts that begin at a cache line each.
struct Parts {
    uint8_t* memory;
    int64_t taken = 0;

    uint8_t* take(int64_t bytes) {
        uint8_t* part = memory + taken;
        taken += (bytes + 63) / 64 * 64;
        return part;
    }
};

// to = a + b
void add(void* to, const void* a, const void* b, Kind kind, int64_t count) {
    constexpr int PART = 256;
    alignas(64) float left[PART], right[PART];
    for (int64_t i = 0; i < count; i += PART) {
        const int n = int(count - i < PART ? count - i : PART);
        read(left, a, i, kind, n);
        read(right, b, i, kind, n);
        for (int k = 0; k < n; k++) left[k] += right[k];
        write(to, i, left, kind, n);
    }
}

// out [rows][outputs] = x [rows][columns] times a layer; whether there was no memory for it.
bool multiply_by(const Product& by, const void* x, int64_t rows, uint8_t* out, const How& how) {
    const int failed = openawq_w4(
        x, by.columns, how.kind, rows, by.columns, by.outputs, by.codes, by.scales, by.scale_kind, by.zeros,
        by.group, by.planes, out, how.digits, how.threads);
    if (by.bias == nullptr) return failed;
    for (int64_t i = 0; i < rows; i++) {
        uint8_t* row = out + i * by.outputs * how.width();
        add(row, row, by.bias, how.kind, by.outputs);
    }
    return failed;
}

}  // namespace

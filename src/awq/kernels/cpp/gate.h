// The activation of one half of a feed-forward block times the other half.
#pragma once

#include "lanes.h"
#include "numbers.h"

enum Activation { SILU = 0, GELU_TANH = 1 };

constexpr int64_t COLUMNS_AT_ONCE = 256;

struct Gate {
    const void *gate, *up;
    int64_t gate_stride, up_stride;  // of rows
    Kind kind;
    int64_t columns;  // divides by WIDE
    Activation activation;
    void* out;  // [rows][columns]
};

// Both activations are x times the logistic function of something.
static inline void activate(const Gate& call, int64_t row, int64_t first) {
    alignas(64) float x[COLUMNS_AT_ONCE], t[COLUMNS_AT_ONCE], powers[COLUMNS_AT_ONCE];
    const int64_t left = call.columns - first;
    const int count = int(left < COLUMNS_AT_ONCE ? left : COLUMNS_AT_ONCE);
    const int64_t to = row * call.columns + first;
    read(x, call.gate, row * call.gate_stride + first, call.kind, count);
    for (int i = 0; i < count; i++)
        t[i] = call.activation == SILU ? x[i] : 1.5957691216f * (x[i] + 0.044715f * x[i] * x[i] * x[i]);
    for (int i = 0; i < count; i++) powers[i] = -__builtin_fabsf(t[i]);
    for (int i = 0; i < count; i += WIDE) exponentials(powers + i, powers + i);
    for (int i = 0; i < count; i++) x[i] *= (t[i] < 0 ? powers[i] : 1) / (1 + powers[i]);
    if (call.kind != FLOAT32) {
        write(call.out, to, x, call.kind, count);
        read(x, call.out, to, call.kind, count);
    }
    read(t, call.up, row * call.up_stride + first, call.kind, count);
    for (int i = 0; i < count; i++) x[i] *= t[i];
    write(call.out, to, x, call.kind, count);
}

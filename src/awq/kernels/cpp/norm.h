// Root mean square norms.
#pragma once

#include <cmath>

#include "lanes.h"
#include "numbers.h"

struct Norm {
    const void* x;  // [rows][columns]; columns divide by WIDE
    Kind kind;
    int64_t rows, columns;
    const void* weight;  // [columns]
    Kind weight_kind;
    float offset;   // added to the weight
    float epsilon;  // added to the mean square
    bool rounds;    // to the kind of x, before the weight
    void* out;
};

static inline void normalize(const Norm& norm, int64_t row) {
    constexpr int PART = 16 * WIDE;
    alignas(64) float values[PART], weights[PART];
    const int64_t first = row * norm.columns;
    Wide sum;
    for (int64_t c = 0; c < norm.columns; c += PART) {
        const int n = int(norm.columns - c < PART ? norm.columns - c : PART);
        read(values, norm.x, first + c, norm.kind, n);
        for (int i = 0; i < n; i += WIDE) sum.add_product(values + i, values + i);
    }
    const float inverse = 1 / std::sqrt(sum.total() / float(norm.columns) + norm.epsilon);
    for (int64_t c = 0; c < norm.columns; c += PART) {
        const int n = int(norm.columns - c < PART ? norm.columns - c : PART);
        read(values, norm.x, first + c, norm.kind, n);
        read(weights, norm.weight, c, norm.weight_kind, n);
        for (int i = 0; i < n; i++) values[i] *= inverse;
        if (norm.rounds) {
            write(norm.out, first + c, values, norm.kind, n);
            read(values, norm.out, first + c, norm.kind, n);
        }
        for (int i = 0; i < n; i++) values[i] *= weights[i] + norm.offset;
        write(norm.out, first + c, values, norm.kind, n);
    }
}

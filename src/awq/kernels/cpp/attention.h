// Attention of one new token over the keys and values of those before it, in float32.
//
// A task is the query heads that share one head of keys and values, so that each is read once. Positions that
// the mask leaves out are not read. Keys and values are taken some at a time, as floats.
#pragma once

#include "lanes.h"
#include "numbers.h"

struct Attention {
    const void *query, *keys, *values;
    Kind kind;
    const uint8_t* mask;     // not 0: attend
    const int64_t* strides;  // of the query 2, of keys 3, of values 3, of the mask 2
    int64_t heads, shared;   // query heads, and how many of them share keys and values
    int64_t length, size;    // size divides by WIDE
    float scale;
    void* out;
};

constexpr int AT_ONCE = 4;  // positions

// Scores padded to whole WIDEs.
static inline int64_t padded(const Attention& call) { return (call.length + WIDE - 1) / WIDE * WIDE; }

// Floats that a task needs: queries and sums, rows of keys or values, scores, and positions in their place.
static inline int64_t floats_of(const Attention& call) {
    return (2 * call.shared + AT_ONCE) * call.size + (call.shared + 1) * padded(call);
}

static inline void attend(const Attention& call, int64_t task, float* memory) {
    const int64_t groups = call.heads / call.shared, size = call.size, room = padded(call);
    const int64_t batch = task / groups, group = task % groups;
    const int64_t* strides = call.strides;
    float* queries = memory;
    float* sums = queries + call.shared * size;
    float* rows = sums + call.shared * size;
    float* scores = rows + AT_ONCE * size;
    int32_t* positions = reinterpret_cast<int32_t*>(scores + call.shared * room);

    int64_t count = 0;
    for (int64_t i = 0; i < call.length; i++)
        if (call.mask == nullptr || call.mask[batch * strides[8] + i * strides[9]])
            positions[count++] = int32_t(i);
    for (int64_t h = 0; h < call.shared; h++) {
        float* query = queries + h * size;
        const int64_t at = batch * strides[0] + (group * call.shared + h) * strides[1];
        read(query, call.query, at, call.kind, int(size));
        for (int64_t d = 0; d < size; d++) query[d] *= call.scale;
    }
    std::memset(sums, 0, sizeof(float) * call.shared * size);

    // Rows past the last one are zeros.
    const auto fetch_rows = [&](const void* from, const int64_t* by, int64_t first) {
        const int64_t start = batch * by[0] + group * by[1];
        for (int i = 0; i < AT_ONCE; i++) {
            if (first + i < count)
                read(rows + i * size, from, start + positions[first + i] * by[2], call.kind, int(size));
            else
                std::memset(rows + i * size, 0, sizeof(float) * size);
        }
    };
    for (int64_t first = 0; first < count; first += AT_ONCE) {
        fetch_rows(call.keys, strides + 2, first);
        for (int64_t h = 0; h < call.shared; h++) {
            Wide products[AT_ONCE];
            for (int64_t d = 0; d < size; d += WIDE)
                for (int i = 0; i < AT_ONCE; i++)
                    products[i].add_product(queries + h * size + d, rows + i * size + d);
            for (int i = 0; i < AT_ONCE; i++) scores[h * room + first + i] = products[i].total();
        }
    }
    for (int64_t h = 0; h < call.shared; h++) {
        float* row = scores + h * room;
        float most = -INFINITY;
        for (int64_t i = 0; i < count; i++) most = row[i] > most ? row[i] : most;
        for (int64_t i = 0; i < count; i++) row[i] -= most;
        const int64_t rest = (count + WIDE - 1) / WIDE * WIDE - count;
        std::memset(row + count, 0, sizeof(float) * rest);
        for (int64_t i = 0; i < count; i += WIDE) exponentials(row + i, row + i);
        std::memset(row + count, 0, sizeof(float) * rest);
        alignas(64) static constexpr float ones[WIDE] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
        Wide total;
        for (int64_t i = 0; i < count; i += WIDE) total.add_product(row + i, ones);
        const float inverse = 1 / total.total();
        for (int64_t i = 0; i < count; i++) row[i] *= inverse;
    }
    for (int64_t first = 0; first < count; first += AT_ONCE) {
        fetch_rows(call.values, strides + 5, first);
        for (int64_t h = 0; h < call.shared; h++) {
            float* sum = sums + h * size;
            const float* weights = scores + h * room + first;
            for (int64_t d = 0; d < size; d += LANES) {
                fvec part = fload(sum + d);
                for (int i = 0; i < AT_ONCE; i++)
                    part = fma(fset(weights[i]), fload(rows + i * size + d), part);
                fstore(sum + d, part);
            }
        }
    }
    for (int64_t h = 0; h < call.shared; h++) {
        const int64_t at = (batch * call.heads + group * call.shared + h) * size;
        write(call.out, at, sums + h * size, call.kind, int(size));
    }
}

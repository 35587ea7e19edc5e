// Rotary position embedding: of each head, channel i is turned together with channel i + size / 2.
#pragma once

#include "numbers.h"

constexpr int LARGEST_HEAD = 512;

struct Rotation {
    const void *query, *keys, *cosines, *sines;
    Kind kind;
    const int64_t* strides;  // of the query 3, of keys 3, of cosines 2, of sines 2
    int64_t heads, groups;   // of the query, and of keys
    int64_t tokens, size;    // size divides by 16, and is LARGEST_HEAD at most
    void* out;               // [batch][heads + groups][tokens][size]
};

// Rounds floats as storing them in another kind does.
static inline void round_to(float* values, Kind kind, int count) {
    if (kind == FLOAT32) return;
    uint16_t stored[LARGEST_HEAD];
    write(stored, 0, values, kind, count);
    read(values, stored, 0, kind, count);
}

// Each product is rounded, and the sum of two as well.
static inline void rotate(const Rotation& call, int64_t task) {
    alignas(64) float cosines[LARGEST_HEAD], sines[LARGEST_HEAD];
    alignas(64) float straight[LARGEST_HEAD], across[LARGEST_HEAD];
    const int64_t batch = task / call.tokens, token = task % call.tokens;
    const int64_t* by = call.strides;
    const int size = int(call.size), half = size / 2;
    read(cosines, call.cosines, batch * by[6] + token * by[7], call.kind, size);
    read(sines, call.sines, batch * by[8] + token * by[9], call.kind, size);
    for (int i = 0; i < half; i++) sines[i] = -sines[i];
    for (int64_t head = 0; head < call.heads + call.groups; head++) {
        const bool is_key = head >= call.heads;
        const int64_t* at = is_key ? by + 3 : by;
        const int64_t first = batch * at[0] + (is_key ? head - call.heads : head) * at[1] + token * at[2];
        const void* from = is_key ? call.keys : call.query;
        read(straight, from, first, call.kind, size);
        for (int i = 0; i < half; i++) across[i] = straight[half + i] * sines[i];
        for (int i = 0; i < half; i++) across[half + i] = straight[i] * sines[half + i];
        for (int i = 0; i < size; i++) straight[i] *= cosines[i];
        round_to(straight, call.kind, size);
        round_to(across, call.kind, size);
        for (int i = 0; i < size; i++) straight[i] += across[i];
        const int64_t row = (batch * (call.heads + call.groups) + head) * call.tokens + token;
        write(call.out, row * size, straight, call.kind, size);
    }
}

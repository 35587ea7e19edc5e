// Rotary position embedding: of each head, channel i is turned together with channel i + size / 2.
#pragma once

#include "numbers.h"

constexpr int LARGEST_HEAD = 512;

// What one token's heads are turned by. `size` divides by 16, and is LARGEST_HEAD at most.
struct Turn {
    alignas(64) float cosines[LARGEST_HEAD], sines[LARGEST_HEAD];
    Kind kind;
    int size;

    // Both are [size], of which the angles' begin at `cosines_at` and `sines_at`.
    Turn(const void* all_cosines, int64_t cosines_at, const void* all_sines, int64_t sines_at, Kind kind, int size)
        : kind(kind), size(size) {
        read(cosines, all_cosines, cosines_at, kind, size);
        read(sines, all_sines, sines_at, kind, size);
        for (int i = 0; i < size / 2; i++) sines[i] = -sines[i];
    }
};

// Rounds floats as storing them in another kind does.
static inline void round_to(float* values, Kind kind, int count) {
    if (kind == FLOAT32) return;
    uint16_t stored[LARGEST_HEAD];
    write(stored, 0, values, kind, count);
    read(values, stored, 0, kind, count);
}

// One head, from channel `first` of `heads` to channel `to` of `out`. Each product is rounded, and the sum of two.
static inline void rotate(const Turn& by, const void* heads, int64_t first, void* out, int64_t to) {
    alignas(64) float straight[LARGEST_HEAD], across[LARGEST_HEAD];
    const int size = by.size, half = size / 2;
    read(straight, heads, first, by.kind, size);
    for (int i = 0; i < half; i++) across[i] = straight[half + i] * by.sines[i];
    for (int i = 0; i < half; i++) across[half + i] = straight[i] * by.sines[half + i];
    for (int i = 0; i < size; i++) straight[i] *= by.cosines[i];
    round_to(straight, by.kind, size);
    round_to(across, by.kind, size);
    for (int i = 0; i < size; i++) straight[i] += across[i];
    write(out, to, straight, by.kind, size);
}

// The same products on AMX tiles: 16 x 16 sums of 64 products each in one instruction.
//
// Digits of rows lie one below the other, so to a tile each digit is a row of its own. A unit is 32 such rows
// times 32 outputs: four tiles of sums (0 to 3), two of digits (4, 5), two of expanded codes (6, 7).
#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include "simd.h"

constexpr int UNIT = 32;

// GCC 12 does not know that tile instructions read memory: what was written must have been, before them.
static inline void written() { asm volatile("" ::: "memory"); }

// Shapes of the tiles, for chunks that are cut into steps of `quads` times four input channels.
struct Tiles {
    int quads;  // rows of a tile of codes, at most 16
    int steps;

    explicit Tiles(int chunk) {
        quads = chunk / 4 < 16 ? chunk / 4 : 16;
        while (chunk / 4 % quads) quads--;
        steps = chunk / 4 / quads;
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } shapes;
        for (int i = 0; i < 8; i++) {
            shapes.rows[i] = i < 6 ? 16 : quads;
            shapes.bytes[i] = i == 4 || i == 5 ? 4 * quads : 64;
        }
        written();
        _tile_loadconfig(&shapes);
    }
    ~Tiles() { _tile_release(); }

    // Sums of a unit: `part` [32 digit rows][32 outputs]. `meanwhile` is work for the other parts of the core.
    template <class F>
    void multiply(
        int32_t* part, const int8_t* digits, int64_t stride, const uint8_t* codes, int64_t row,
        const F& meanwhile) const {
        written();
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int s = 0; s < steps; s++) {
            const int8_t* x = digits + s * 4 * quads;
            const uint8_t* w = codes + s * quads * row;
            _tile_loadd(4, x, stride);
            _tile_loadd(6, w, row);
            _tile_loadd(7, w + 64, row);
            _tile_dpbsud(0, 4, 6);
            _tile_dpbsud(1, 4, 7);
            _tile_loadd(5, x + 16 * stride, stride);
            _tile_dpbsud(2, 5, 6);
            _tile_dpbsud(3, 5, 7);
        }
        meanwhile();
        _tile_stored(0, part, 4 * UNIT);
        _tile_stored(1, part + 16, 4 * UNIT);
        _tile_stored(2, part + 16 * UNIT, 4 * UNIT);
        _tile_stored(3, part + 16 * UNIT + 16, 4 * UNIT);
    }
};

// Linux gives tiles only to processes that ask.
static inline bool may_use_tiles() {
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

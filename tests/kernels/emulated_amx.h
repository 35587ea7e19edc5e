// The AMX instructions that the library uses, in plain C++, so that their use can be tested on any processor.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

struct EmulatedTile {
    int rows, bytes;
    uint8_t data[16][64];
};
inline thread_local EmulatedTile emulated[8];

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbsud

#define _tile_loadconfig emulated_loadconfig
#define _tile_release emulated_release
#define _tile_zero emulated_zero
#define _tile_loadd emulated_loadd
#define _tile_stored emulated_stored
#define _tile_dpbsud emulated_dpbsud

inline void emulated_loadconfig(const void* from) {
    const uint8_t* bytes = static_cast<const uint8_t*>(from);
    for (int i = 0; i < 8; i++) {
        uint16_t width;
        std::memcpy(&width, bytes + 16 + 2 * i, 2);
        emulated[i] = {bytes[48 + i], width, {}};
    }
}

inline void emulated_release() {
    for (EmulatedTile& tile : emulated) tile = {};
}

inline void emulated_zero(int t) { std::memset(emulated[t].data, 0, sizeof(emulated[t].data)); }

inline void emulated_loadd(int t, const void* from, int64_t stride) {
    emulated_zero(t);
    for (int r = 0; r < emulated[t].rows; r++)
        std::memcpy(emulated[t].data[r], static_cast<const uint8_t*>(from) + r * stride, emulated[t].bytes);
}

inline void emulated_stored(int t, void* to, int64_t stride) {
    for (int r = 0; r < emulated[t].rows; r++)
        std::memcpy(static_cast<uint8_t*>(to) + r * stride, emulated[t].data[r], emulated[t].bytes);
}

// Signed bytes of `a` times unsigned bytes of `b`, four at a time.
inline void emulated_dpbsud(int c, int a, int b) {
    for (int m = 0; m < emulated[c].rows; m++)
        for (int k = 0; k < emulated[a].bytes / 4; k++)
            for (int n = 0; n < emulated[c].bytes / 4; n++) {
                int32_t sum;
                std::memcpy(&sum, emulated[c].data[m] + 4 * n, 4);
                for (int i = 0; i < 4; i++)
                    sum += int8_t(emulated[a].data[m][4 * k + i]) * int(emulated[b].data[k][4 * n + i]);
                std::memcpy(emulated[c].data[m] + 4 * n, &sum, 4);
            }
}

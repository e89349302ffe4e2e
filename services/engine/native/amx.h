// Bfloat16 on CPUs with AMX: sixteen rows of 32 elements times 32 elements of sixteen columns in one instruction.
//
// A panel of packed weights, keys turned over and values in pairs already have the layout that its right-hand tiles want: sixteen lanes
// (pairs of elements) below each other. Of rows that do not fill a tile the results are not used; the memory behind them must be readable.
#pragma once

#include "simd.h"

#ifdef __AMX_BF16__
namespace baton {

struct Amx : Bf16 {
    static constexpr int rows = 32, unit = 16, piece = 9 * W, pairs = 1;
    // Pieces of 16 rows and 32 columns, one behind the other: of bfloat16 each is a tile. What a product writes then lies together, where
    // rows of a wide matrix would cost a cache line of their own for each 32 columns.
    static INLINE long place(long row, long column, long width) {
        return (row / 16 * (width / 32) + column / 32) * 512 + row % 16 * 32 + column % 32;
    }
    struct Session {  // tiles of 16 x 64 bytes, for this thread
        Session() {
            struct alignas(64) {
                uint8_t palette = 1, start = 0, reserved[14] = {};
                uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
                uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
            } config;
            _tile_loadconfig(&config);
        }
        ~Session() { _tile_release(); }
        Session(const Session&) = delete;
    };
};

// What has been written must lie in memory when tiles are read from it: GCC's tile loads do not tell the compiler that they read.
INLINE void written() { __asm__ volatile("" ::: "memory"); }

// Left-hand tiles: 16 rows each, `row` lanes apart; the next 32 elements of all rows stand `step` lanes behind, the next 16 rows `down`.
struct Left {
    const uint32_t* at;
    long row, step, down;
};
// Right-hand tiles: sixteen lanes of 16 columns below each other, `lane` lanes apart.
struct Right {
    const uint32_t *near, *far;
    long lane;
};

// The `k`-th 32 elements of up to 32 rows times those of 32 columns. Tiles: 0-3 sums, 4-5 rows, 6-7 columns.
template <bool BOTH>
INLINE void amx_step(const Left& a, const Right& b, long k) {
    _tile_loadd(6, b.near + k * W * b.lane, b.lane * 4);
    _tile_loadd(4, a.at + k * a.step, a.row * 4);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b.far + k * W * b.lane, b.lane * 4);
    _tile_dpbf16ps(1, 4, 7);
    if (BOTH) {
        _tile_loadd(5, a.at + a.down + k * a.step, a.row * 4);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}
template <bool BOTH>
INLINE void amx_clear() {
    _tile_zero(0);
    _tile_zero(1);
    if (BOTH) {
        _tile_zero(2);
        _tile_zero(3);
    }
}
template <bool BOTH>
INLINE void amx_load(const float* from, long row) {
    written();
    _tile_loadd(0, from, row * 4);
    _tile_loadd(1, from + W, row * 4);
    if (BOTH) {
        _tile_loadd(2, from + W * row, row * 4);
        _tile_loadd(3, from + W * row + W, row * 4);
    }
}
template <bool BOTH>
INLINE void amx_store(float* to, long row) {
    _tile_stored(0, to, row * 4);
    _tile_stored(1, to + W, row * 4);
    if (BOTH) {
        _tile_stored(2, to + W * row, row * 4);
        _tile_stored(3, to + W * row + W, row * 4);
    }
}

}  // namespace baton
#endif

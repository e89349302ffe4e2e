// Matrix products: rows of activations times weights that were packed once.
//
// Packed weights of a layer `[N, K]`: panels of 32 outputs, each `[K / step][32]` lanes, so that a panel is read front to back. The sums of
// a tile go through a small buffer in L1 into what is made of them (`Out`): a residual, an activation, a logit.
#pragma once

#include <algorithm>
#include <utility>
#include "amx.h"

namespace baton {

constexpr int COLUMNS = 2 * W;

// sums[r][j] += a[r] . w[:, j]: `depth` lanes of `R` rows, `a_row` apart, times `V` vectors of weights, `w_vector` apart.
template <class E, int R, int V>
INLINE void multiply(F (&sums)[R][V], const uint32_t* a, long a_row, const uint32_t* w, long w_lane, long w_vector, long depth) {
    for (long k = 0; k < depth; ++k)
#pragma GCC unroll 2
        for (int part = 0; part < E::parts; ++part) {  // one part of the weights at a time: for more there are no registers
            U lanes[V];
#pragma GCC unroll 8
            for (int j = 0; j < V; ++j) lanes[j] = E::part(load<U>(w + k * w_lane + j * w_vector), part);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                U x = E::part(E::parts > 1 ? spread(a + r * a_row + k) : splat(a[r * a_row + k]), part);
#pragma GCC unroll 8
                for (int j = 0; j < V; ++j) sums[r][j] = E::mac(sums[r][j], x, lanes[j]);
            }
        }
}

template <class E, int R>
__attribute__((noinline)) void tile(const uint32_t* a, const uint32_t* panel, long depth, float* to) {
    constexpr int V = together(R) < 2 ? 1 : 2;
    for (int c = 0; c < COLUMNS; c += V * W) {
        F sums[R][V] = {};
        multiply<E, R, V>(sums, a, depth, panel + c, COLUMNS, W, depth);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
            for (int j = 0; j < V; ++j) store(to + r * COLUMNS + c + j * W, sums[r][j]);
    }
}

template <class E, int... R>
void vector_tile(std::integer_sequence<int, R...>, int rows, const uint32_t* a, const uint32_t* panel, long depth, float* to) {
    using Tile = void (*)(const uint32_t*, const uint32_t*, long, float*);
    static constexpr Tile tiles[] = {tile<E, R + 1>...};
    tiles[rows - 1](a, panel, depth, to);
}

// Weights that are wanted soon: so many cache lines, a few with each sixteen lanes of depth, lest they hold up those that are wanted now.
struct Ahead {
    const uint32_t* from;
    long lines;
};

// `depth` of a row's `all` lanes, from `first` on.
struct Piece {
    long first, depth, all;
};

// to `[rows][32]` = a `[rows][all]` (as E places them) times one panel: `depth` lanes of it, the sums of those before are in `to`. `rows` is
// at most E::rows.
template <class E>
void product(int rows, const uint32_t* a, const uint32_t* panel, Piece piece, Ahead&, float* to) {
    vector_tile<E>(std::make_integer_sequence<int, E::rows>(), rows, a, panel, piece.all, to);
}

#ifdef __AMX_BF16__
template <bool BOTH>
INLINE void amx_product(const uint32_t* a, const uint32_t* panel, Piece piece, Ahead& ahead, float* to) {
    const Left left{a + piece.first * W, W, W * W, W * piece.all};
    const Right right{panel + piece.first * COLUMNS, panel + piece.first * COLUMNS + W, COLUMNS};
    piece.first ? amx_load<BOTH>(to, COLUMNS) : amx_clear<BOTH>();
    written();
    for (long k = 0; k < piece.depth / W; ++k) {
        for (long i = 0; i < ahead.lines; ++i, ahead.from += W) __builtin_prefetch(ahead.from, 0, 2);
        amx_step<BOTH>(left, right, k);
    }
    amx_store<BOTH>(to, COLUMNS);
}
template <>
inline void product<Amx>(int rows, const uint32_t* a, const uint32_t* panel, Piece piece, Ahead& ahead, float* to) {
    rows > W ? amx_product<true>(a, panel, piece, ahead, to) : amx_product<false>(a, panel, piece, ahead, to);
}
#endif

// Up to 16 rows times two panels: two streams of weights come from memory faster than one. For kinds with `pairs`.
template <class E>
void product_of_two(const uint32_t* a, const uint32_t* panel, const uint32_t* next, long depth, float* to, float* behind);

#ifdef __AMX_BF16__
// Load a cache line for its own sake. Vector loads and fetches together bring weights from memory faster than tile loads alone: the loads
// wake the core's own fetching, and tiles then come from L1.
INLINE void touch(const uint32_t* line) { __asm__ volatile("vmovdqu32 (%0), %%zmm16" ::"r"(line) : "zmm16"); }

template <>
inline void product_of_two<Amx>(const uint32_t* a, const uint32_t* panel, const uint32_t* next, long depth, float* to, float* behind) {
    amx_clear<true>();
    written();
    for (long k = 0; k < depth; k += W) {
        const long soon = std::min(k + W, depth - W) * COLUMNS, later = (k + 4 * W) * COLUMNS;
        for (long i = 0; i < 2 * W * W; i += W) {
            __builtin_prefetch(panel + later + i);
            touch(panel + soon + i);
            __builtin_prefetch(next + later + i);
            touch(next + soon + i);
        }
        _tile_loadd(4, a + k * W, W * 4);
        _tile_loadd(5, panel + k * COLUMNS, COLUMNS * 4);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, panel + k * COLUMNS + W, COLUMNS * 4);
        _tile_dpbf16ps(1, 4, 6);
        _tile_loadd(7, next + k * COLUMNS, COLUMNS * 4);
        _tile_dpbf16ps(2, 4, 7);
        _tile_loadd(5, next + k * COLUMNS + W, COLUMNS * 4);
        _tile_dpbf16ps(3, 4, 5);
    }
    _tile_stored(0, to, COLUMNS * 4);
    _tile_stored(1, to + W, COLUMNS * 4);
    _tile_stored(2, behind, COLUMNS * 4);
    _tile_stored(3, behind + W, COLUMNS * 4);
}
#endif

// Rows that `gemm` takes at most.
constexpr long MOST_ROWS = 512;

// out(row, column, v0, v1) is called for every row and every 32 columns with the sums of a `[rows, K]` (as E places them) times weights
// `[columns, K]`. Each panel passes by all rows, piece by piece.
template <class E, class Out>
void gemm(const typename E::T* activations, const uint32_t* weights, long rows, long columns, long inner, int threads, const Out& out) {
    const auto* a = reinterpret_cast<const uint32_t*>(activations);
    const long depth = inner / E::step, panels = (columns + COLUMNS - 1) / COLUMNS, size = depth * COLUMNS;
    const long units = (rows + E::unit - 1) / E::unit, tiles = (rows + E::rows - 1) / E::rows;
    const long pieces = E::piece && tiles > 1 ? (depth + E::piece - 1) / E::piece : 1;
    const long share = std::max(2l, panels / (8 * threads) * 2), parts = (panels + share - 1) / share;
    const auto start = [&](long t) { return std::min(rows, units * t / tiles * E::unit); };
    const auto cut = [&](long n) { return depth / W * n / pieces * W; };
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        typename E::Session session;
        alignas(64) float all[(MOST_ROWS + E::rows) * COLUMNS];
        // Sums of a whole depth need two places: what is made of one tile's sums overlaps with the next tile's products.
        const auto sums = [&](long t) { return all + (pieces > 1 ? t : t % 2) * E::rows * COLUMNS; };
        const auto finish = [&](long p, long t, const float* from) {
            for (long row = start(t); row < start(t + 1); ++row, from += COLUMNS) out(row, p * COLUMNS, load<F>(from), load<F>(from + W));
        };
#pragma omp for schedule(dynamic)
        for (long part = 0; part < parts; ++part) {
            long p = part * share;
            const long end = std::min(panels, p + share);
            if constexpr (E::pairs)
                for (; rows <= W && p + 1 < end; p += 2) {
                    product_of_two<E>(a, weights + p * size, weights + (p + 1) * size, depth, sums(0), sums(1));
                    finish(p, 0, sums(0));
                    finish(p + 1, 0, sums(1));
                }
            for (; p < end; ++p) {
                const uint32_t* panel = weights + p * size;
                Ahead ahead = {panel + (tiles > 1 ? size : 2 * W * COLUMNS), (2 * W + tiles - 1) / tiles};
                for (long n = 0; n < pieces; ++n)
                    for (long t = 0; t < tiles; ++t) {
                        const Piece piece = {cut(n), pieces > 1 ? cut(n + 1) - cut(n) : depth, depth};
                        product<E>(start(t + 1) - start(t), a + start(t) * depth, panel, piece, ahead, sums(t));
                        if (t && n == pieces - 1) finish(p, t - 1, sums(t - 1));
                    }
                finish(p, tiles - 1, sums(tiles - 1));
            }
        }
    }
}

}  // namespace baton

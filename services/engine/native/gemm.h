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
constexpr int BLOCK_ROWS = 192; // rows whose activations stay in a core's L2 cache while all panels pass by

// sums[r][j] += a[r] . w[:, j]: `depth` lanes of `R` rows, `a_row` apart, times `V` vectors of weights, `w_vector` apart.
template <class E, int R, int V>
INLINE void multiply(F (&sums)[R][V], const uint32_t* a, long a_row, const uint32_t* w, long w_lane, long w_vector, long depth) {
    for (long k = 0; k < depth; ++k) {
        U lanes[V];
#pragma GCC unroll 8
        for (int j = 0; j < V; ++j) lanes[j] = load<U>(w + k * w_lane + j * w_vector);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            U x = splat(a[r * a_row + k]);
#pragma GCC unroll 8
            for (int j = 0; j < V; ++j) sums[r][j] = E::mac(sums[r][j], x, lanes[j]);
        }
    }
}

template <class E, int R>
__attribute__((noinline)) void tile(const uint32_t* a, const uint32_t* panel, long depth, float* to) {
    F sums[R][2] = {};
    multiply<E, R, 2>(sums, a, depth, panel, COLUMNS, W, depth);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) store(to + r * COLUMNS, sums[r][0]), store(to + r * COLUMNS + W, sums[r][1]);
}

template <class E, int... R>
void vector_tile(std::integer_sequence<int, R...>, int rows, const uint32_t* a, const uint32_t* panel, long depth, float* to) {
    using Tile = void (*)(const uint32_t*, const uint32_t*, long, float*);
    static constexpr Tile tiles[] = {tile<E, R + 1>...};
    tiles[rows - 1](a, panel, depth, to);
}

// to `[rows][32]` = a `[rows][depth]` times one panel, which comes from memory (`fresh`) or a cache. `rows` is at most E::rows.
template <class E>
void product(int rows, const uint32_t* a, const uint32_t* panel, bool, long depth, float* to) {
    vector_tile<E>(std::make_integer_sequence<int, E::rows>(), rows, a, panel, depth, to);
}

#ifdef __AMX_BF16__
template <bool BOTH, bool FRESH>
INLINE void amx_tile(const uint32_t* a, const uint32_t* panel, long depth, float* to) {
    amx_clear<BOTH>();
    amx_product<BOTH, FRESH>(a, depth, panel, panel + W, COLUMNS, depth);
    amx_store<BOTH>(to, COLUMNS);
}
template <>
inline void product<Amx>(int rows, const uint32_t* a, const uint32_t* panel, bool fresh, long depth, float* to) {
    if (rows > W) fresh ? amx_tile<true, true>(a, panel, depth, to) : amx_tile<true, false>(a, panel, depth, to);
    else fresh ? amx_tile<false, true>(a, panel, depth, to) : amx_tile<false, false>(a, panel, depth, to);
}
#endif

// out(row, column, v0, v1) is called for every row and every 32 columns with the sums of a `[rows, K]` times weights `[columns, K]`.
template <class E, class Out>
void gemm(const typename E::T* activations, const uint32_t* weights, long rows, long columns, long inner, int threads, const Out& out) {
    const auto* a = reinterpret_cast<const uint32_t*>(activations);
    const long depth = inner / E::step, panels = (columns + COLUMNS - 1) / COLUMNS;
    const long blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS, units = (rows + E::unit - 1) / E::unit;
    const long share = std::max(1l, panels / (4 * threads)), parts = (panels + share - 1) / share;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        typename E::Session session;
        alignas(64) float sums[2][E::rows * COLUMNS];  // what is made of one tile's sums overlaps with the next tile's products
#pragma omp for schedule(dynamic)
        for (long task = 0; task < blocks * parts; ++task) {
            const long begin = units * (task / parts) / blocks, end = units * (task / parts + 1) / blocks;
            const long tiles = ((end - begin) * E::unit + E::rows - 1) / E::rows;
            const auto start = [&](long t) { return std::min(rows, (begin + (end - begin) * t / tiles) * E::unit); };
            const auto finish = [&](long p, long t) {
                const float* from = sums[t % 2];
                for (long row = start(t); row < start(t + 1); ++row, from += COLUMNS) out(row, p * COLUMNS, load<F>(from), load<F>(from + W));
            };
            for (long p = task % parts * share; p < std::min(panels, (task % parts + 1) * share); ++p) {
                for (long t = 0; t < tiles; ++t) {
                    product<E>(start(t + 1) - start(t), a + start(t) * depth, weights + p * depth * COLUMNS, t == 0, depth, sums[t % 2]);
                    if (t) finish(p, t - 1);
                }
                finish(p, tiles - 1);
            }
        }
    }
}

}  // namespace baton

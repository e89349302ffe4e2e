// What the machine gives these kernels at best: products and reads by themselves, for the benchmark's bounds.
#pragma once

#include "gemm.h"

namespace baton {

// Elements `[rows, width]`, row by row, to where E places them, or back; `width` is a multiple of 32.
template <class E>
void arrange(const void* from, long rows, long width, bool back, void* to) {
    using T = typename E::T;
    const T* source = static_cast<const T*>(from);
    for (long r = 0; r < rows; ++r)
        for (long i = 0; i < width; i += W) {
            const long plain = r * width + i, placed = E::place(r, i, width);
            memcpy(static_cast<T*>(to) + (back ? plain : placed), source + (back ? placed : plain), W * sizeof(T));
        }
}

// As E places them: out `[rows, columns]` = activations `[rows, inner]` times packed weights; `columns` is a multiple of 32.
template <class E>
void bare_gemm(const void* activations, const uint32_t* weights, long rows, long columns, long inner, int threads, void* out) {
    using T = typename E::T;
    constexpr long block = 256;  // rows at a time whose activations stay in a core's L2 cache
    for (long first = 0; first < rows; first += block) {
        T* to = static_cast<T*>(out) + first * columns;
        const auto* a = static_cast<const T*>(activations) + first * inner;
        gemm<E>(a, weights, std::min(block, rows - first), columns, inner, threads, [&](long row, long column, F x, F y) {
            E::narrow(to + E::place(row, column, columns), x);
            E::narrow(to + E::place(row, column + W, columns), y);
        });
    }
}

// The sum of `count` floats, a multiple of 256: the reads of a vector loop with nothing to wait for.
inline float read_all(const float* from, long count, int threads) {
    float total = 0;
#pragma omp parallel for num_threads(threads) if (threads > 1) reduction(+ : total)
    for (long block = 0; block < count / 256; ++block) {
        F sums[4] = {};
        for (long i = block * 256; i < (block + 1) * 256; i += 4 * W) {
            __builtin_prefetch(from + i + 2048);
#pragma GCC unroll 4
            for (int k = 0; k < 4; ++k) sums[k] += load<F>(from + i + k * W);
        }
        total += sum(sums[0] + sums[1] + sums[2] + sums[3]);
    }
    return total;
}

}  // namespace baton

// Attention straight on the pages, for groups of query heads that share a KV head.
//
// Queries come scaled by log2(e) / sqrt(d), so that weights are powers of two. Keys of 16 tokens are turned over, so that one vector holds
// one lane of 16 keys and scores need no sums across lanes. One token (decode): all scores, then the values. Prompts: blocks of queries
// times blocks of keys with a running maximum (Milakov & Gimelshein 2018; FlashAttention).
#pragma once

#include <vector>
#include "gemm.h"

namespace baton {

struct Pages {  // the pool [pages, layers, 2, kv_heads, page_tokens, head_dim], seen from one layer
    char* base;
    long layers, kv_heads, page_tokens, head_dim, layer;

    template <class E>
    typename E::T* row(long page, int value, long head, long token) const {
        const long at = (((page * layers + layer) * 2 + value) * kv_heads + head) * page_tokens + token;
        return reinterpret_cast<typename E::T*>(base) + at * head_dim;
    }
};

struct Chunk {  // `tokens` rows of the launch from `first` on, behind `start` tokens that lie in pages already
    int64_t first, tokens, start, pages;  // pages: where its page ids begin in the launch's table
};

// Queries of one chunk's heads that share a KV head, in `[tokens][width]` as E places them; what attention makes of them replaces them.
template <class E>
struct Queries {
    typename E::T* base;
    long first, column, width;  // the chunk's first row, the first head's first column

    typename E::T* piece(long token, long at) const { return base + E::place(first + token, column + at, width); }  // of 16 elements
};

// What one KV head's queries meet: keys and values as `gather` leaves them, of a chunk with `tokens` behind `start` others.
struct Context {
    const uint32_t *keys, *values;
    long start, tokens, group, dim;
};

constexpr long KEYS = 128;       // keys that are weighed at a time
constexpr long PIECES = KEYS / W;  // of 16 keys, a vector
constexpr long QUERY_ROWS = 96;  // rows (tokens x heads of the group) of a block of queries
constexpr long MOST_HEAD = 256;  // head_dim
const float NONE = -__builtin_inff();

inline long padded(long tokens) { return (tokens + KEYS - 1) / KEYS * KEYS; }

// Scores of `R` rows with KEYS keys, turned over: keys `[PIECES][lanes][16]`.
template <class E, int R>
INLINE void score(const uint32_t* q, long q_row, const uint32_t* keys, long lanes, float* to, long to_row) {
    constexpr int V = together(R);
    for (int v = 0; v < PIECES; v += V) {
        F sums[R][V] = {};
        multiply<E, R, V>(sums, q, q_row, keys + v * lanes * W, W, lanes * W, lanes);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int j = 0; j < V; ++j) store(to + r * to_row + (v + j) * W, sums[r][j]);
    }
}

// Two rows of values as vectors of pairs: one for the even elements of a row and one for the odd ones. One row, if elements are whole lanes.
INLINE void pair(Float, const uint32_t* v, const uint32_t*, U (&out)[1]) { out[0] = load<U>(v); }
INLINE void pair(Bf16, const uint32_t* v, const uint32_t* next, U (&out)[2]) {
    U a = load<U>(v), b = load<U>(next);
    out[0] = (a & 0xffffu) | (b << 16);
    out[1] = (a >> 16) | (b & 0xffff0000u);
}
INLINE void unpair(float* to, F (&sums)[1]) { store(to, sums[0]); }
INLINE void unpair(uint16_t* to, F (&sums)[2]) {
    alignas(64) uint16_t even[W], odd[W];
    Bf16::narrow(even, sums[0]);
    Bf16::narrow(odd, sums[1]);
    U lanes = wide(load<H>(even)) | (wide(load<H>(odd)) << 16);
    store(to, lanes);
}

// One query token of `R` heads over tokens that lie in pages; `weights` holds `R` rows of `room` elements, normalised by `by`.
template <class E, int R>
void weigh(const Pages& pages, const int64_t* table, long tokens, long head, const typename E::T* weights, long room, const float* by,
           typename E::T* out) {
    static const uint32_t zeros[W] = {};
    const long lanes = pages.head_dim / E::step;
    const auto* p = reinterpret_cast<const uint32_t*>(weights);
    for (long z = 0; z < lanes; z += W) {
        F sums[R][E::step] = {};
        for (long page = 0, t = 0; t < tokens; ++page) {
            const auto* v = reinterpret_cast<const uint32_t*>(pages.row<E>(table[page], 1, head, 0)) + z;
            const long end = std::min(t + pages.page_tokens, tokens);
            for (; t < end; t += E::step, v += E::step * lanes) {
                U pairs[E::step];
                pair(E{}, v, t + 1 < end ? v + lanes : zeros, pairs);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    U x = splat(p[(r * room + t) / E::step]);
                    for (int j = 0; j < E::step; ++j)
                        for (int part = 0; part < E::parts; ++part) sums[r][j] = E::mac(sums[r][j], E::part(x, part), E::part(pairs[j], part));
                }
            }
        }
        for (int r = 0; r < R; ++r) {
            for (int j = 0; j < E::step; ++j) sums[r][j] *= by[r];
            unpair(out + r * pages.head_dim + z * E::step, sums[r]);
        }
    }
}

// Scores of `tokens` tokens, with room for `room`, into weights, zeros behind the last one; returns their sum.
template <class E>
float weights_of(float* scores, long tokens, long room, typename E::T* weights) {
    for (long t = tokens; t < room; ++t) scores[t] = NONE;
    F top = splat(NONE), total = {};
    for (long t = 0; t < room; t += W) top = larger(top, load<F>(scores + t));
    top = splat(largest(top));
    for (long t = 0; t < room; t += W) {
        F e = E::exp2(load<F>(scores + t) - top);
        total += e;
        E::narrow(weights + t, e);
    }
    return sum(total);
}

// `scratch`: floats for R rows of scores and as many elements of weights, and KEYS keys turned over.
template <class E, int R>
void decode_heads(const Pages& pages, const int64_t* table, long tokens, long head, const typename E::T* q, typename E::T* out, float* scratch) {
    const long lanes = pages.head_dim / E::step, room = padded(tokens), group = pages.page_tokens / W;
    float* scores = scratch;
    auto* weights = reinterpret_cast<typename E::T*>(scores + R * room);
    auto* keys = reinterpret_cast<uint32_t*>(scores + 2 * R * room);
    for (long t = 0; t < tokens; t += KEYS) {
        for (int b = 0; b < PIECES; ++b) {
            const long at = std::min(t / W + b, (tokens - 1) / W);
            const auto* from = reinterpret_cast<const uint32_t*>(pages.row<E>(table[at / group], 0, head, at % group * W));
            const auto* later = reinterpret_cast<const char*>(pages.row<E>(table[std::min(at + 4, (tokens - 1) / W) / group], 0, head, (at + 4) % group * W));
            for (long line = 0; line < W * lanes * 4; line += 64) __builtin_prefetch(later + line);
            for (long z = 0; z < lanes; z += W) transpose(from + z, lanes, keys + (b * lanes + z) * W);
        }
        score<E, R>(reinterpret_cast<const uint32_t*>(q), lanes, keys, lanes, scores + t, room);
    }
    float by[R];
    for (int r = 0; r < R; ++r) by[r] = 1 / weights_of<E>(scores + r * room, tokens, room, weights + r * room);
    weigh<E, R>(pages, table, tokens, head, weights, room, by, out);
}

// One token's queries over `tokens` tokens in pages.
template <class E>
void decode(const Pages& pages, const int64_t* table, long tokens, long head, long group, const Queries<E>& queries, float* scratch) {
    typename E::T* q = queries.piece(0, 0);
    for (long g = 0; g < group;) {
        typename E::T* at = q + g * pages.head_dim;
        const long left = group - g;
        if (left >= 4) decode_heads<E, 4>(pages, table, tokens, head, at, at, scratch), g += 4;
        else if (left == 3) decode_heads<E, 3>(pages, table, tokens, head, at, at, scratch), g += 3;
        else if (left == 2) decode_heads<E, 2>(pages, table, tokens, head, at, at, scratch), g += 2;
        else decode_heads<E, 1>(pages, table, tokens, head, at, at, scratch), g += 1;
    }
}
// Floats of scratch for the longest of a launch's sequences.
inline long decode_scratch(long tokens, long head_dim) { return 3 * W * padded(tokens) + KEYS * head_dim; }

// 16 keys and values of one KV head, from token `16 * at` on, into the layouts that `prefill` reads: keys turned over, `[tokens / 16][lanes]
// [16]` lanes, and values `[tokens / step][head_dim]` lanes, pairs of tokens in a lane, zeros behind the last token.
template <class E>
void gather(const Pages& pages, const int64_t* table, long tokens, long head, long at, uint32_t* keys, uint32_t* values) {
    const long lanes = pages.head_dim / E::step, group = pages.page_tokens / W, dim = pages.head_dim;
    uint32_t* to = values + at * W / E::step * dim;
    if (at * W >= tokens) {
        std::fill(to, to + W / E::step * dim, 0u);
        std::fill(keys + at * lanes * W, keys + (at + 1) * lanes * W, 0u);
        return;
    }
    const auto* k = reinterpret_cast<const uint32_t*>(pages.row<E>(table[at / group], 0, head, at % group * W));
    for (long z = 0; z < lanes; z += W) transpose(k + z, lanes, keys + (at * lanes + z) * W);
    const auto* v = pages.row<E>(table[at / group], 1, head, at % group * W);
    alignas(64) static const typename E::T zeros[W] = {};
    for (long t = 0; t < W; t += E::step)
        for (long i = 0; i < dim; i += W) {
            const auto* one = at * W + t < tokens ? v + t * dim + i : zeros;
            const auto* two = at * W + t + 1 < tokens ? v + (t + 1) * dim + i : zeros;
            store(to + t / E::step * dim + i, E::lanes(one, two));
        }
}

// rows `[R]` of weights times KEYS values, added to `out` `[R][head_dim]` floats.
template <class E, int R>
INLINE void add_values(const uint32_t* weights, const uint32_t* values, long dim, float* out) {
    constexpr int V = together(R) < 2 ? 1 : 2;
    for (long c = 0; c < dim; c += V * W) {
        F sums[R][V];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
            for (int j = 0; j < V; ++j) sums[r][j] = load<F>(out + r * dim + c + j * W);
        multiply<E, R, V>(sums, weights, KEYS / E::step, values + c, dim, W, KEYS / E::step);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
            for (int j = 0; j < V; ++j) store(out + r * dim + c + j * W, sums[r][j]);
    }
}

// `rows` of queries (scaled) with KEYS keys turned over → scores `[rows][KEYS]`.
template <class E>
void scores_of(long rows, const uint32_t* queries, const uint32_t* keys, long lanes, float* to) {
    long r = 0;
    for (; r + E::rows <= rows; r += E::rows) score<E, E::rows>(queries + r * lanes, lanes, keys, lanes, to + r * KEYS, KEYS);
    for (; r + 4 <= rows; r += 4) score<E, 4>(queries + r * lanes, lanes, keys, lanes, to + r * KEYS, KEYS);
    for (; r < rows; ++r) score<E, 1>(queries + r * lanes, lanes, keys, lanes, to + r * KEYS, KEYS);
}

// `rows` of weights times KEYS values, added to `out` `[rows][dim]`.
template <class E>
void values_of(long rows, const uint32_t* weights, const uint32_t* values, long dim, float* out) {
    constexpr long lanes = KEYS / E::step;
    long r = 0;
    for (; r + E::rows <= rows; r += E::rows) add_values<E, E::rows>(weights + r * lanes, values, dim, out + r * dim);
    for (; r + 4 <= rows; r += 4) add_values<E, 4>(weights + r * lanes, values, dim, out + r * dim);
    for (; r < rows; ++r) add_values<E, 1>(weights + r * lanes, values, dim, out + r * dim);
}

// One row of scores into weights against a running maximum; what has been summed so far shrinks when that grows.
template <class E>
INLINE void weigh_row(const float* scores, typename E::T* weights, float& top, float* total, float* out, long dim) {
    F s[PIECES], tops[PIECES / 2], totals = load<F>(total);
    for (int j = 0; j < PIECES; ++j) s[j] = load<F>(scores + j * W);
    for (int j = 0; j < PIECES / 2; ++j) tops[j] = larger(s[2 * j], s[2 * j + 1]);
    const float highest = largest(larger(larger(tops[0], tops[1]), larger(tops[2], tops[3])));
    if (highest > top) {
        const F shrink = exp2(splat(top - highest));
        top = highest;
        totals *= shrink;
        for (long i = 0; i < dim; i += W) store(out + i, load<F>(out + i) * shrink);
    }
    const F by = splat(top);
    for (int j = 0; j < PIECES; ++j) {
        const F e = E::exp2(s[j] - by);
        totals += e;
        E::narrow(weights + j * W, e);
    }
    store(total, totals);
}

// A prompt's queries in blocks against all keys that they may see; with its scratch, in a core's own cache.
template <class E>
class Prefill {
    using T = typename E::T;
    std::vector<float> scores, out, top, total;
    std::vector<uint32_t> queries, weights;

    static long block_tokens(long group) { return std::max(1l, QUERY_ROWS / group); }

  public:
    explicit Prefill(long dim)
        : scores(E::rows * KEYS), out(QUERY_ROWS * dim), top(QUERY_ROWS), total(QUERY_ROWS * W), queries(QUERY_ROWS * dim), weights(E::rows * KEYS) {}

    static long blocks(long tokens, long group) { return (tokens + block_tokens(group) - 1) / block_tokens(group); }

    // Rows of a block are token * group + head.
    void run(const Context& c, const Queries<E>& q, long block) {
        const long dim = c.dim, group = c.group, first = block * block_tokens(group), lanes = dim / E::step;
        const long count = std::min(block_tokens(group), c.tokens - first), rows = count * group, seen = c.start + first + count;
        auto* asked = reinterpret_cast<T*>(queries.data());
        for (long r = 0; r < rows; ++r)
            for (long i = 0; i < dim; i += W) memcpy(asked + r * dim + i, q.piece(first + r / group, r % group * dim + i), W * sizeof(T));
        std::fill(out.begin(), out.end(), 0.f);
        std::fill(top.begin(), top.end(), NONE);
        std::fill(total.begin(), total.end(), 0.f);
        for (long t = 0; t < seen; t += KEYS)
            for (long strip = 0; strip < rows; strip += E::rows) {
                const long more = std::min(long(E::rows), rows - strip);
                scores_of<E>(more, queries.data() + strip * lanes, c.keys + t * lanes, lanes, scores.data());
                for (long r = 0; r < more; ++r) {
                    const long at = strip + r;
                    for (long k = std::max(0l, c.start + first + at / group + 1 - t); k < KEYS; ++k) scores[r * KEYS + k] = NONE;  // later ones
                    weigh_row<E>(scores.data() + r * KEYS, reinterpret_cast<T*>(weights.data()) + r * KEYS, top[at], total.data() + at * W,
                                 out.data() + at * dim, dim);
                }
                values_of<E>(more, weights.data(), c.values + t / E::step * dim, dim, out.data() + strip * dim);
            }
        for (long r = 0; r < rows; ++r) {
            const F by = splat(1 / sum(load<F>(total.data() + r * W)));
            for (long i = 0; i < dim; i += W)
                E::narrow(q.piece(first + r / group, r % group * dim + i), load<F>(out.data() + r * dim + i) * by);
        }
    }
};

}  // namespace baton

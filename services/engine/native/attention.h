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

constexpr long KEYS = 128;       // keys that are weighed at a time
constexpr long PIECES = KEYS / W;  // of 16 keys, a vector
constexpr long QUERY_ROWS = 96;  // rows (tokens x heads of the group) of a block of queries
const float NONE = -__builtin_inff();

inline long padded(long tokens) { return (tokens + KEYS - 1) / KEYS * KEYS; }

// Scores of `R` rows with KEYS keys, turned over: keys `[PIECES][lanes][16]`.
template <class E, int R>
INLINE void score(const uint32_t* q, long q_row, const uint32_t* keys, long lanes, float* to, long to_row) {
    constexpr int V = R <= 6 ? 4 : 2;  // as many vectors as there are registers for sums
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
    U lanes = __builtin_convertvector(load<H>(even), U) | (__builtin_convertvector(load<H>(odd), U) << 16);
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
                    for (int j = 0; j < E::step; ++j) sums[r][j] = E::mac(sums[r][j], x, pairs[j]);
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

// One token: q `[group][head_dim]` of one KV head over `tokens` tokens in pages → out `[group][head_dim]`.
template <class E>
void decode(const Pages& pages, const int64_t* table, long tokens, long head, long group, const typename E::T* q, typename E::T* out, float* scratch) {
    for (long g = 0; g < group;) {
        const long more = g * pages.head_dim, left = group - g;
        if (left >= 4) decode_heads<E, 4>(pages, table, tokens, head, q + more, out + more, scratch), g += 4;
        else if (left == 3) decode_heads<E, 3>(pages, table, tokens, head, q + more, out + more, scratch), g += 3;
        else if (left == 2) decode_heads<E, 2>(pages, table, tokens, head, q + more, out + more, scratch), g += 2;
        else decode_heads<E, 1>(pages, table, tokens, head, q + more, out + more, scratch), g += 1;
    }
}
// Floats of scratch for the longest of a launch's sequences.
inline long decode_scratch(long tokens, long head_dim) { return 3 * W * padded(tokens) + KEYS * head_dim; }

#ifdef __AMX_BF16__
// Two rows of 32 values in pairs: tiles' columns in the order in which unpacking leaves them; `in_order` puts a row of sums right again.
INLINE void zip(const uint16_t* one, const uint16_t* two, uint32_t* low, uint32_t* high) {
    const __m512i a = _mm512_loadu_si512(one), b = _mm512_loadu_si512(two);
    _mm512_store_si512(low, _mm512_unpacklo_epi16(a, b));
    _mm512_store_si512(high, _mm512_unpackhi_epi16(a, b));
}
INLINE void in_order(const float* low, const float* high, float by, uint16_t* to) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512 a = _mm512_loadu_ps(low), b = _mm512_loadu_ps(high);
    Bf16::narrow(to, reinterpret_cast<F>(_mm512_permutex2var_ps(a, first, b)) * splat(by));
    Bf16::narrow(to + W, reinterpret_cast<F>(_mm512_permutex2var_ps(a, _mm512_add_epi32(first, _mm512_set1_epi32(8)), b)) * splat(by));
}

// Up to 16 heads at a time. Keys are the left-hand tiles as they lie in the pages, queries the right-hand ones.
inline void amx_decode(const Pages& pages, const int64_t* table, long tokens, long head, long heads, const uint16_t* q, uint16_t* out, float* scratch) {
    constexpr long AHEAD = 4;  // pieces of 16 tokens that are fetched ahead
    const long dim = pages.head_dim, lanes = dim / 2, room = padded(tokens), pieces = (tokens + W - 1) / W, group = pages.page_tokens / W;
    const auto piece = [&](int value, long at) { return pages.row<Bf16>(table[at / group], value, head, at % group * W); };
    const auto fetch = [&](int value, long at) {
        if (at >= pieces) return;
        const auto* from = reinterpret_cast<const char*>(piece(value, at));
        for (long line = 0; line < W * dim * 2; line += 64) __builtin_prefetch(from + line, 0, 2);
    };
    float* scores = scratch;
    auto* weights = reinterpret_cast<uint16_t*>(scores + W * room);
    // A tile of sums has a column for each head, and 16 of them: with few heads, several pieces of keys share it, each with its own columns.
    const long share = heads <= 4 ? 4 : heads <= 8 ? 2 : 1, columns = W / share;
    alignas(64) uint32_t queries[4][256 / 2 * W] = {}, block[2][4 * 256];
    alignas(64) float sums[4 * 256], turned[256];
    for (long h = 0; h < heads; ++h)
        for (long l = 0; l < lanes; ++l)
            for (long s = 0; s < share; ++s) memcpy(queries[s] + l * W + s * columns + h, q + h * dim + l * 2, 4);
    for (long at = 0; at < AHEAD; ++at) fetch(0, at);
    // Behind the last token may lie what is no number, which would spoil the others' columns: a piece that is not full has its own tile.
    const long full = tokens / W;
    for (long at = 0, count; at < pieces; at += count) {
        count = at < full ? std::min(share, full - at) : 1;
        written();
        _tile_zero(0);
        for (long s = 0; s < count; ++s) {
            fetch(0, at + s + AHEAD);
            const uint16_t* keys = piece(0, at + s);
            for (long l = 0; l < lanes; l += W) {
                _tile_loadd(4, keys + l * 2, dim * 2);
                _tile_loadd(6, queries[s] + l * W, 64);
                _tile_dpbf16ps(0, 4, 6);
            }
        }
        _tile_stored(0, sums, 64);
        transpose(reinterpret_cast<const uint32_t*>(sums), W, reinterpret_cast<uint32_t*>(turned));
        for (long s = 0; s < count; ++s)
            for (long h = 0; h < heads; ++h) store(scores + h * room + (at + s) * W, load<F>(turned + (s * columns + h) * W));
    }
    for (long at = 0; at < AHEAD; ++at) fetch(1, at);
    float by[W];
    for (long h = 0; h < heads; ++h) by[h] = 1 / weights_of<Bf16>(scores + h * room, tokens, room, weights + h * room);
    alignas(64) static const uint16_t zeros[32] = {};
    for (long c = 0; c < dim; c += 64) {
        const long halves = dim - c > 32 ? 2 : 1;
        amx_clear<true>();
        for (long t = 0; t < tokens; t += 32) {
            uint32_t* to = block[t / 32 % 2];
            for (long s = 0; s < 2; ++s) {
                const long at = t / W + s;
                if (c == 0) fetch(1, at + AHEAD);
                const uint16_t* v = piece(1, std::min(at, pieces - 1)) + c;
                for (long r = 0; r < W; r += 2) {
                    const uint16_t* one = at * W + r < tokens ? v + r * dim : zeros;
                    const uint16_t* two = at * W + r + 1 < tokens ? v + (r + 1) * dim : zeros;
                    uint32_t* line = to + (s * 8 + r / 2) * W;
                    zip(one, two, line, line + 256);
                    if (halves == 2) zip(one == zeros ? zeros : one + 32, two == zeros ? zeros : two + 32, line + 512, line + 768);
                }
            }
            written();
            _tile_loadd(4, weights + t, room * 2);
            _tile_loadd(5, to, 64);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(6, to + 256, 64);
            _tile_dpbf16ps(1, 4, 6);
            if (halves == 2) {
                _tile_loadd(5, to + 512, 64);
                _tile_dpbf16ps(2, 4, 5);
                _tile_loadd(6, to + 768, 64);
                _tile_dpbf16ps(3, 4, 6);
            }
        }
        _tile_stored(0, sums, 64);
        _tile_stored(1, sums + 256, 64);
        _tile_stored(2, sums + 512, 64);
        _tile_stored(3, sums + 768, 64);
        for (long h = 0; h < heads; ++h)
            for (long half = 0; half < halves; ++half)
                in_order(sums + half * 512 + h * W, sums + half * 512 + 256 + h * W, by[h], out + h * dim + c + half * 32);
    }
}
template <>
inline void decode<Amx>(const Pages& pages, const int64_t* table, long tokens, long head, long group, const uint16_t* q, uint16_t* out, float* scratch) {
    for (long g = 0; g < group; g += W)
        amx_decode(pages, table, tokens, head, std::min(long(W), group - g), q + g * pages.head_dim, out + g * pages.head_dim, scratch);
}
#endif

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
    for (long c = 0; c < dim; c += 2 * W) {
        F sums[R][2];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
            for (int j = 0; j < 2; ++j) sums[r][j] = load<F>(out + r * dim + c + j * W);
        multiply<E, R, 2>(sums, weights, KEYS / E::step, values + c, dim, W, KEYS / E::step);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
            for (int j = 0; j < 2; ++j) store(out + r * dim + c + j * W, sums[r][j]);
    }
}

// `rows` of queries (scaled) with KEYS keys turned over → scores `[rows][KEYS]`.
template <class E>
void scores_of(long rows, const uint32_t* queries, const uint32_t* keys, long lanes, float* to) {
    long r = 0;
    for (; r + 12 <= rows; r += 12) score<E, 12>(queries + r * lanes, lanes, keys, lanes, to + r * KEYS, KEYS);
    for (; r + 4 <= rows; r += 4) score<E, 4>(queries + r * lanes, lanes, keys, lanes, to + r * KEYS, KEYS);
    for (; r < rows; ++r) score<E, 1>(queries + r * lanes, lanes, keys, lanes, to + r * KEYS, KEYS);
}

// `rows` of weights times KEYS values, added to `out` `[rows][dim]`.
template <class E>
void values_of(long rows, const uint32_t* weights, const uint32_t* values, long dim, float* out) {
    constexpr long lanes = KEYS / E::step;
    long r = 0;
    for (; r + 12 <= rows; r += 12) add_values<E, 12>(weights + r * lanes, values, dim, out + r * dim);
    for (; r + 4 <= rows; r += 4) add_values<E, 4>(weights + r * lanes, values, dim, out + r * dim);
    for (; r < rows; ++r) add_values<E, 1>(weights + r * lanes, values, dim, out + r * dim);
}

#ifdef __AMX_BF16__
template <>
inline void scores_of<Amx>(long rows, const uint32_t* queries, const uint32_t* keys, long lanes, float* to) {
    for (long r = 0; r < rows; r += 2 * W)
        for (long v = 0; v < KEYS; v += 2 * W) {
            const uint32_t *near = keys + v * lanes, *far = near + W * lanes;
            if (rows - r > W) {
                amx_clear<true>();
                amx_product<true>(queries + r * lanes, lanes, near, far, W, lanes);
                amx_store<true>(to + r * KEYS + v, KEYS);
            } else {
                amx_clear<false>();
                amx_product<false>(queries + r * lanes, lanes, near, far, W, lanes);
                amx_store<false>(to + r * KEYS + v, KEYS);
            }
        }
}
template <>
inline void values_of<Amx>(long rows, const uint32_t* weights, const uint32_t* values, long dim, float* out) {
    constexpr long lanes = KEYS / 2;
    for (long r = 0; r < rows; r += 2 * W)
        for (long c = 0; c < dim; c += 2 * W) {
            if (rows - r > W) {
                amx_load<true>(out + r * dim + c, dim);
                amx_product<true>(weights + r * lanes, lanes, values + c, values + c + W, dim, lanes);
                amx_store<true>(out + r * dim + c, dim);
            } else {
                amx_load<false>(out + r * dim + c, dim);
                amx_product<false>(weights + r * lanes, lanes, values + c, values + c + W, dim, lanes);
                amx_store<false>(out + r * dim + c, dim);
            }
        }
}
#endif

struct Block {  // scratch of one block of queries, in a core's own cache
    std::vector<float> scores, out, top, total;
    std::vector<uint32_t> queries, weights;
    Block(long rows, long head_dim)
        : scores(rows * KEYS), out(QUERY_ROWS * head_dim), top(QUERY_ROWS), total(QUERY_ROWS * W), queries(QUERY_ROWS * head_dim),
          weights(rows * KEYS) {}
};

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

// `count` tokens from `first` on of a chunk whose first token stands at position `start`, for one KV head; rows are token * group + head.
// q and out `[tokens][row]` elements.
template <class E>
void prefill(const uint32_t* keys, const uint32_t* values, long start, long first, long count, long group, long dim, const typename E::T* q,
             typename E::T* out, long row, Block& block) {
    using T = typename E::T;
    const long lanes = dim / E::step, rows = count * group, seen = start + first + count;
    for (long r = 0; r < rows; ++r)
        memcpy(block.queries.data() + r * lanes, q + (first + r / group) * row + r % group * dim, dim * sizeof(T));
    std::fill(block.out.begin(), block.out.end(), 0.f);
    std::fill(block.top.begin(), block.top.end(), NONE);
    std::fill(block.total.begin(), block.total.end(), 0.f);
    auto* weights = reinterpret_cast<T*>(block.weights.data());
    for (long t = 0; t < seen; t += KEYS)
        for (long strip = 0; strip < rows; strip += E::rows) {
            const long more = std::min(long(E::rows), rows - strip);
            scores_of<E>(more, block.queries.data() + strip * lanes, keys + t * lanes, lanes, block.scores.data());
            for (long r = 0; r < more; ++r) {
                float* scores = block.scores.data() + r * KEYS;
                const long at = strip + r;
                if (t + KEYS > start + first)  // some of these keys may come later than the query
                    for (long k = std::max(0l, start + first + at / group + 1 - t); k < KEYS; ++k) scores[k] = NONE;
                weigh_row<E>(scores, weights + r * KEYS, block.top[at], block.total.data() + at * W, block.out.data() + at * dim, dim);
            }
            values_of<E>(more, block.weights.data(), values + t / E::step * dim, dim, block.out.data() + strip * dim);
        }
    for (long r = 0; r < rows; ++r) {
        const F by = splat(1 / sum(load<F>(block.total.data() + r * W)));
        for (long i = 0; i < dim; i += W)
            E::narrow(out + (first + r / group) * row + r % group * dim + i, load<F>(block.out.data() + r * dim + i) * by);
    }
}

}  // namespace baton

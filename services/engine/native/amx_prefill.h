// A prompt's attention on CPUs with AMX: a strip of query rows passes by blocks of keys and values.
//
// Tile products and vector instructions do not run beside each other: while products are under way, a core has one port for vectors
// instead of two. So each has its turn, and what counts is how few vector instructions a weight costs.
#pragma once

#include <memory>
#include "attention.h"

#ifdef __AMX_BF16__
namespace baton {

template <>
class Prefill<Amx> {
    static constexpr long ROWS = 2 * W, BLOCK = 64;  // rows (token * group + head) of a strip, and keys that are weighed at a time
    static constexpr long PAIRS = BLOCK / 32, LANES = BLOCK / 2;
    static constexpr float SLACK = 256;

    static constexpr F ORDER = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

    struct alignas(64) Scratch {
        float scores[ROWS * BLOCK], out[ROWS * MOST_HEAD], total[ROWS * W];
        float low[ROWS * W], shrink[ROWS];  // low: 16 times minus the maximum that a row's weights are of
        uint32_t queries[ROWS * MOST_HEAD / 2], weights[ROWS * LANES];
    };
    std::unique_ptr<Scratch> own{new Scratch};  // not cleared

  public:
    explicit Prefill(long) {}

    static long blocks(long tokens, long group) { return (tokens * group + ROWS - 1) / ROWS; }

    void run(const Context& c, const Queries<Amx>& q, long strip) {
        const long first = strip * ROWS, rows = std::min(ROWS, c.tokens * c.group - first);
        const long all_see = c.start + first / c.group + 1, seen = c.start + (first + rows - 1) / c.group + 1;
        begin(c, q, first, rows);
        for (long block = 0; block * BLOCK < seen; ++block) {
            add_scores(c, block);
            if ((block + 1) * BLOCK > all_see) hide(c, first, block);
            bool grown = false;
            for (long r = 0; r < ROWS; ++r) grown |= block ? weigh_row<false>(r) : weigh_row<true>(r);
            if (grown && block) shrink(c);
            add_values(c, block);
        }
        each(c, first, rows, [&](long r, long token, long column) {
            const F by = splat(1 / sum(load<F>(own->total + r * W)));
            for (long i = 0; i < c.dim; i += W) Bf16::narrow(q.piece(token, column + i), load<F>(own->out + r * c.dim + i) * by);
        });
    }

  private:
    // act(row of the strip, token of the chunk, first column of the head): without a division for each row.
    template <class Act>
    static INLINE void each(const Context& c, long first, long rows, const Act& act) {
        long token = first / c.group, head = first % c.group;
        for (long r = 0; r < rows; ++r) {
            act(r, token, head * c.dim);
            if (++head == c.group) head = 0, ++token;
        }
    }
    void begin(const Context& c, const Queries<Amx>& q, long first, long rows) {
        auto* to = reinterpret_cast<uint16_t*>(own->queries);
        std::fill(to + rows * c.dim, to + ROWS * c.dim, uint16_t(0));
        each(c, first, rows, [&](long r, long token, long column) {
            for (long i = 0; i < c.dim; i += W) memcpy(to + r * c.dim + i, q.piece(token, column + i), W * 2);
        });
        std::fill(own->out, own->out + ROWS * c.dim, 0.f);
        std::fill(own->total, own->total + ROWS * W, 0.f);
        std::fill(own->low, own->low + ROWS * W, 0.f);
        std::fill(own->shrink, own->shrink + ROWS, 1.f);
    }

    // Scores of a block of keys, less the rows' maxima: sums begin with these.
    INLINE void add_scores(const Context& c, long block) {
        const long lanes = c.dim / 2;
        for (long pair = 0; pair < PAIRS; ++pair) {
            const uint32_t* keys = c.keys + (block * BLOCK + pair * 32) * lanes;
            written();
            _tile_loadd(0, own->low, W * 4);
            _tile_loadd(1, own->low, W * 4);
            _tile_loadd(2, own->low + W * W, W * 4);
            _tile_loadd(3, own->low + W * W, W * 4);
            for (long k = 0; k < c.dim / 32; ++k) amx_step<true>({own->queries, lanes, W, W * lanes}, {keys, keys + W * lanes, W}, k);
            amx_store<true>(own->scores + pair * 32, BLOCK);
        }
    }

    INLINE void add_values(const Context& c, long block) {
        for (long at = 0; at < c.dim; at += 32) {
            const uint32_t* values = c.values + block * LANES * c.dim + at;
            amx_load<true>(own->out + at, c.dim);
            for (long k = 0; k < PAIRS; ++k) amx_step<true>({own->weights, LANES, W, W * LANES}, {values, values + W, c.dim}, k);
            amx_store<true>(own->out + at, c.dim);
        }
    }

    // Scores of keys that come later than the query.
    void hide(const Context& c, long first, long block) {
        each(c, first, ROWS, [&](long r, long token, long) {
            const long may = c.start + token + 1 - block * BLOCK;  // how many of the block's keys the row sees
            for (long j = std::max(0l, may / W); j < BLOCK / W; ++j) {
                float* scores = own->scores + r * BLOCK + j * W;
                store(scores, ORDER < splat(float(may - j * W)) ? load<F>(scores) : splat(NONE));
            }
        });
    }

    // Scores of a row into weights. Its maximum follows only when a weight has become larger than 2^8 or so: sums have room for that (as
    // in FlashAttention-4). True: then what has been summed so far must shrink.
    template <bool FIRST>
    INLINE bool weigh_row(long r) {
        const float* scores = own->scores + r * BLOCK;
        auto* weights = reinterpret_cast<uint16_t*>(own->weights) + r * BLOCK;
        F s[BLOCK / W], e[BLOCK / W], totals = load<F>(own->total + r * W);
        const auto raise = [&] {
            F part = {};
            for (int j = 0; j < BLOCK / W; ++j) part += e[j] = exp2_rough(s[j]);
            return part;
        };
        for (int j = 0; j < BLOCK / W; ++j) s[j] = load<F>(scores + j * W);
        F part = {};
        if (!FIRST) part = raise();
        const bool grows = FIRST || above(part, SLACK);
        if (__builtin_expect(grows, FIRST)) {
            F high = s[0];
            for (int j = 1; j < BLOCK / W; ++j) high = larger(high, s[j]);
            const F by = splat(largest(high)), shrink = FIRST ? splat(1.f) : exp2(-by);
            own->shrink[r] = shrink[0];
            totals *= shrink;
            store(own->low + r * W, load<F>(own->low + r * W) - by);
            for (int j = 0; j < BLOCK / W; ++j) s[j] -= by;
            part = raise();
        }
        for (int j = 0; j < BLOCK / W; j += 2) narrow_two(weights + j * W, e[j], e[j + 1]);
        store(own->total + r * W, totals + part);
        return grows;
    }

    void shrink(const Context& c) {
        for (long r = 0; r < ROWS; ++r) {
            if (own->shrink[r] == 1) continue;
            for (long i = 0; i < c.dim; i += W) store(own->out + r * c.dim + i, load<F>(own->out + r * c.dim + i) * splat(own->shrink[r]));
            own->shrink[r] = 1;
        }
    }

    static INLINE bool above(F a, float b) {
        return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(a), _mm512_set1_ps(b), _CMP_GT_OQ) != 0;
    }
    static INLINE void narrow_two(uint16_t* to, F a, F b) {
        const __m512bh both = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(a));
        memcpy(to, &both, sizeof both);
    }
    // 2^y of the part behind the point, times 2 to the whole part. Minimax polynomial on [0, 1): relative error below 8e-5.
    static INLINE F exp2_rough(F y) {
        const __m512 z = reinterpret_cast<__m512>(y), f = _mm512_reduce_ps(z, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
        __m512 p = _mm512_set1_ps(7.802449e-2f);
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.2606758e-1f));
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9583318e-1f));
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.9992528e-1f));
        return reinterpret_cast<F>(_mm512_scalef_ps(p, z));
    }
};

}  // namespace baton
#endif

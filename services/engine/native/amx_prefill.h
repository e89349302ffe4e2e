// A prompt's attention on CPUs with AMX. Tile products and exponentials use different parts of a core, so they take turns by a few
// instructions: while the weights of one block of keys are made of its scores, the values of the block before are added up, and the scores
// of the block behind computed.
#pragma once

#include <memory>
#include "attention.h"

#ifdef __AMX_BF16__
namespace baton {

template <>
class Prefill<Amx> {
    static constexpr long ROWS = 2 * W, BLOCK = 64;  // rows (token * group + head) of a strip, and keys that are weighed at a time
    static constexpr long PAIRS = BLOCK / 32, LANES = BLOCK / 2;
    static constexpr float SLACK = 8, LEAST = -1e30f;

    struct alignas(64) Scratch {
        float scores[2][ROWS * BLOCK], out[ROWS * 256], total[ROWS * W];
        uint32_t queries[ROWS * 128], weights[2][ROWS * LANES];
        float top[ROWS], shrink[ROWS];
    };
    std::unique_ptr<Scratch> own = std::make_unique<Scratch>();

  public:
    explicit Prefill(long) {}

    static long blocks(long tokens, long group) { return (tokens * group + ROWS - 1) / ROWS; }

    void run(const Context& c, const Queries<Amx>& q, long strip) {
        const long first = strip * ROWS, rows = std::min(ROWS, c.tokens * c.group - first);
        const long all_see = c.start + first / c.group + 1, seen = c.start + (first + rows - 1) / c.group + 1;
        begin(c, q, first, rows);
        const long last = (seen - 1) / BLOCK;
        for (long n = 0; n < per_block(c); ++n) add_scores(c, 0, n);
        for (long block = 0; block <= last; ++block) {
            if ((block + 1) * BLOCK > all_see) hide(c, first, block);
            weigh(c, block, block < last);
        }
        for (long n = 0; n < per_block(c); ++n) add_values(c, last, n);
        for (long r = 0; r < rows; ++r) {
            const F by = splat(1 / sum(load<F>(own->total + r * W)));
            for (long i = 0; i < c.dim; i += W) Bf16::narrow(piece(c, q, first + r, i), load<F>(own->out + r * c.dim + i) * by);
        }
    }

  private:
    static uint16_t* piece(const Context& c, const Queries<Amx>& q, long row, long at) { return q.piece(row / c.group, row % c.group * c.dim + at); }
    static long per_block(const Context& c) { return PAIRS * (c.dim / 32); }  // steps of scores, or of values

    void begin(const Context& c, const Queries<Amx>& q, long first, long rows) {
        auto* to = reinterpret_cast<uint16_t*>(own->queries);
        std::fill(to + rows * c.dim, to + ROWS * c.dim, uint16_t(0));
        for (long r = 0; r < rows; ++r)
            for (long i = 0; i < c.dim; i += W) memcpy(to + r * c.dim + i, piece(c, q, first + r, i), W * 2);
        std::fill(own->out, own->out + ROWS * c.dim, 0.f);
        std::fill(own->total, own->total + ROWS * W, 0.f);
        std::fill(own->top, own->top + ROWS, LEAST);
        std::fill(own->shrink, own->shrink + ROWS, 1.f);
    }

    // Step `n` of the scores of a block of keys.
    INLINE void add_scores(const Context& c, long block, long n) {
        const long lanes = c.dim / 2, steps = c.dim / 32, pair = n / steps, k = n % steps;
        const uint32_t* keys = c.keys + (block * BLOCK + pair * 32) * lanes;
        if (k == 0) amx_clear<true>();
        written();
        amx_step<true>({own->queries, lanes, W, W * lanes}, {keys, keys + W * lanes, W}, k);
        if (k == steps - 1) amx_store<true>(own->scores[block % 2] + pair * 32, BLOCK);
    }

    // Step `n` of adding a block of values by their weights.
    INLINE void add_values(const Context& c, long block, long n) {
        const long at = n / PAIRS * 32, k = n % PAIRS;
        const uint32_t* values = c.values + block * LANES * c.dim + at;
        if (k == 0) amx_load<true>(own->out + at, c.dim);
        written();
        amx_step<true>({own->weights[block % 2], LANES, W, W * LANES}, {values, values + W, c.dim}, k);
        if (k == PAIRS - 1) amx_store<true>(own->out + at, c.dim);
    }

    // Scores of keys that come later than the query.
    void hide(const Context& c, long first, long block) {
        for (long r = 0; r < ROWS; ++r) {
            float* scores = own->scores[block % 2] + r * BLOCK;
            for (long k = std::max(0l, c.start + (first + r) / c.group + 1 - block * BLOCK); k < BLOCK; ++k) scores[k] = NONE;
        }
    }

    // Scores of a block into weights; between its rows, the values of the block before and the scores of the next.
    void weigh(const Context& c, long block, bool more) {
        const long steps = per_block(c);
        long done = block ? 0 : steps;
        const long due = more ? 2 * steps : steps;
        bool grown = false;
        for (long r = 0; r < ROWS; ++r) {
            grown |= weigh_row(block, r);
            for (; done < due && done * ROWS < 2 * steps * (r + 1); ++done) done < steps ? add_values(c, block - 1, done) : add_scores(c, block + 1, done - steps);
        }
        if (grown) shrink(c);
    }

    // A row's weights are of its running maximum, which follows only when it has been left behind by a factor of 2^8: sums have room for
    // that (Dao et al., FlashAttention-4). True: what has been summed so far must shrink.
    INLINE bool weigh_row(long block, long r) {
        const float* scores = own->scores[block % 2] + r * BLOCK;
        auto* weights = reinterpret_cast<uint16_t*>(own->weights[block % 2]) + r * BLOCK;
        F s[BLOCK / W], totals = load<F>(own->total + r * W);
        for (int j = 0; j < BLOCK / W; ++j) s[j] = load<F>(scores + j * W);
        const F high = larger(larger(s[0], s[1]), larger(s[2], s[3]));
        const bool grows = above(high, own->top[r] + SLACK);
        if (__builtin_expect(grows, 0)) {
            const float top = largest(high);
            own->shrink[r] = exp2(splat(own->top[r] - top))[0];
            own->top[r] = top;
            totals *= splat(own->shrink[r]);
        }
        const F by = splat(own->top[r]);
        F e[BLOCK / W];
        for (int j = 0; j < BLOCK / W; ++j) e[j] = exp2_rough(s[j] - by);
        for (int j = 0; j < BLOCK / W; j += 2) narrow_two(weights + j * W, e[j], e[j + 1]);
        store(own->total + r * W, totals + ((e[0] + e[1]) + (e[2] + e[3])));
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

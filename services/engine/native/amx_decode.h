// One token's attention on CPUs with AMX, straight on the pages.
#pragma once

#include "attention.h"

#ifdef __AMX_BF16__
namespace baton {

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

// Up to 16 heads at a time, from the `first` of the group on. Keys are the left-hand tiles as they lie in the pages, queries the
// right-hand ones.
inline void amx_decode(const Pages& pages, const int64_t* table, long tokens, long head, long first, long heads, const Queries<Amx>& q, float* scratch) {
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
    alignas(64) uint32_t queries[4][MOST_HEAD / 2 * W] = {}, block[2][4 * 256];
    alignas(64) float sums[4 * 256], turned[256];
    const auto place = [&](long h, long at) { return q.piece(0, (first + h) * dim + at); };
    for (long h = 0; h < heads; ++h)
        for (long l = 0; l < lanes; ++l)
            for (long s = 0; s < share; ++s) memcpy(queries[s] + l * W + s * columns + h, place(h, l / 8 * W) + l % 8 * 2, 4);
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
                in_order(sums + half * 512 + h * W, sums + half * 512 + 256 + h * W, by[h], place(h, c + half * 32));
    }
}
template <>
inline void decode<Amx>(const Pages& pages, const int64_t* table, long tokens, long head, long group, const Queries<Amx>& q, float* scratch) {
    for (long g = 0; g < group; g += W) amx_decode(pages, table, tokens, head, g, std::min(long(W), group - g), q, scratch);
}

}  // namespace baton
#endif

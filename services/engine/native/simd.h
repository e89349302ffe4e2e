// The two kinds of elements that lanes hold, one float or two bfloat16, and what is computed with them.
//
// Everything above this file is written in lanes: a lane of activations times a lane of weights is one multiply-add (float) or two
// (bfloat16 pairs, one instruction on CPUs with AVX-512 BF16).
#pragma once

#include "lanes.h"

namespace baton {

// 2^y; 0 for y < -126, minus infinity included; at least 2^127 for y > 127. Least-squares polynomials on [-1/2, 1/2]: relative error below
// 3e-7, or with PLACES = 3 below 1e-4, a twentieth of what rounding to bfloat16 costs.
template <int PLACES>
INLINE F exp2_to(F y) {
    constexpr float fine[] = {1.f, 6.9314718e-1f, 2.4022651e-1f, 5.5504109e-2f, 9.6181291e-3f, 1.3333558e-3f, 1.5403530e-4f};
    constexpr float rough[] = {9.9992863e-01f, 6.9327119e-01f, 2.4260672e-01f, 5.5116342e-02f};
    const float* c = PLACES == 6 ? fine : rough;
#ifdef __AVX512F__
    const __m512 z = reinterpret_cast<__m512>(y), f = _mm512_sub_ps(z, _mm512_roundscale_ps(z, 0));
    __m512 p = _mm512_set1_ps(c[PLACES]);
#pragma GCC unroll 6
    for (int i = PLACES - 1; i >= 0; --i) p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c[i]));
    return reinterpret_cast<F>(_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(z, _mm512_set1_ps(-126.f), _CMP_GE_OQ), p, _mm512_sub_ps(z, f)));
#else
    const F magic = splat(12582912.f);
    y = smaller(y, splat(127.f));
    F t = y + magic;  // rounds to an integer, which then lies in the lowest bits
    F f = y - (t - magic), p = splat(c[PLACES]);
#pragma GCC unroll 6
    for (int i = PLACES - 1; i >= 0; --i) p = p * f + splat(c[i]);
    F r = bits(bits(p) + (bits(t) << 23));
    return from_on(y, -126.f, r);
#endif
}
INLINE F exp2(F y) { return exp2_to<6>(y); }

// 1 / x for x >= 1, relative error below 1e-7.
INLINE F inverse(F x) {
#ifdef __AVX512F__
    const __m512 v = reinterpret_cast<__m512>(x), y = _mm512_rcp14_ps(v);
    const __m512 z = _mm512_mul_ps(y, _mm512_fnmadd_ps(v, y, _mm512_set1_ps(2.f)));
    return reinterpret_cast<F>(_mm512_mask_mov_ps(z, _mm512_cmp_ps_mask(v, _mm512_set1_ps(1e30f), _CMP_GT_OQ), _mm512_setzero_ps()));
#else
    return splat(1.f) / x;
#endif
}

// Rows of 16 lanes `[16][16]`, `stride` lanes apart, turned over: to[i * 16 + j] = from[j * stride + i].
INLINE void transpose(const uint32_t* from, long stride, uint32_t* to) {
#ifdef __AVX512F__
    __m512i r[16], s[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(from + i * stride);
    for (int i = 0; i < 16; i += 2) {
        s[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        s[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(s[i], s[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(s[i], s[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(s[i + 1], s[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(s[i + 1], s[i + 3]);
    }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; ++j) {
            s[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
            s[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xdd);
        }
    for (int j = 0; j < 8; ++j) {
        r[j] = _mm512_shuffle_i32x4(s[j], s[j + 8], 0x88);
        r[j + 8] = _mm512_shuffle_i32x4(s[j], s[j + 8], 0xdd);
    }
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * 16, r[i]);
#else
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 16; ++j) to[i * 16 + j] = from[j * stride + i];
#endif
}

// Kinds of elements. `rows`: of activations that are multiplied at a time, a multiple of `unit`; a Session is what a thread needs for it.
// `piece`: lanes of depth that are multiplied at a time if rows are many, so that weights stay in L1 for all of them; 0: all.
// `parts`: in how many multiply-adds a lane is multiplied, each with its `part` of both.
// `pairs`: whether few rows meet two panels of weights at a time.
// `place`: where a row's elements from `column` on (a multiple of 16; 16 of them lie together) stand in activations `[rows][width]`.
struct Float {
    struct Session {};
    using T = float;
    static constexpr int rows = ROWS_AT_ONCE, unit = 1, piece = 0, pairs = 0;
    static constexpr int step = 1;  // elements in a lane
    static INLINE long place(long row, long column, long width) { return row * width + column; }
    static constexpr int parts = 1;
    static INLINE U part(U v, int) { return v; }
    static INLINE F mac(F acc, U a, U w) { return acc + bits(a) * bits(w); }
    static INLINE F widen(const T* from) { return load<F>(from); }
    static INLINE void narrow(T* to, F v) { store(to, v); }
    static INLINE F exp2(F y) { return baton::exp2(y); }  // as exact as elements are
    static INLINE U lanes(const T* a, const T*) { return load<U>(a); }  // 16 lanes of one row, or of two rows in pairs
};

struct Bf16 {
    struct Session {};
    using T = uint16_t;
    static constexpr int rows = ROWS_AT_ONCE, unit = 1, piece = 0, pairs = 0;
    static constexpr int step = 2;
    static INLINE long place(long row, long column, long width) { return row * width + column; }
#ifdef __AVX512BF16__
    static constexpr int parts = 1;
    static INLINE U part(U v, int) { return v; }
    static INLINE F mac(F acc, U a, U w) {
        return reinterpret_cast<F>(
            _mm512_dpbf16_ps(reinterpret_cast<__m512>(acc), reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(a)));
    }
#else
    static constexpr int parts = 2;
    static INLINE U part(U v, int odd) { return odd ? v & 0xffff0000u : v << 16; }
    static INLINE F mac(F acc, U a, U w) { return acc + bits(a) * bits(w); }
#endif
    static INLINE F exp2(F y) { return exp2_to<3>(y); }
    static INLINE U lanes(const T* a, const T* b) {
        return wide(load<H>(a)) | wide(load<H>(b)) << 16;
    }
    static INLINE F widen(const T* from) { return bits(wide(load<H>(from)) << 16); }
    static INLINE void narrow(T* to, F v) {  // to the nearest, ties to even
#ifdef __AVX512BF16__
        const __m256bh b = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
        memcpy(to, &b, sizeof b);
#else
        U b = bits(v);
        b = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
        store(to, baton::narrow(b));
#endif
    }
};

}  // namespace baton

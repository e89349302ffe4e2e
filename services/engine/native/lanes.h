// Sixteen lanes of 32 bits: one register, or halves of it on CPUs whose registers are smaller.
//
// GCC has vectors of any width, but keeps those that are wider than a register in memory, and adds them up there: on AVX2 a prompt
// in float32 took seven to ten times as long as with halves.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace baton {

#define INLINE inline __attribute__((always_inline))

constexpr int W = 16;

template <class V>
struct Two {
    V lo, hi;
};

#ifdef __AVX512F__
constexpr int BYTES = 64;
template <class V>
using Sixteen = V;
#elif defined(__AVX__)
constexpr int BYTES = 32;
template <class V>
using Sixteen = Two<V>;
#else
constexpr int BYTES = 16;
template <class V>
using Sixteen = Two<Two<V>>;
#endif

// Of one register.
using FloatPart = float __attribute__((vector_size(BYTES)));
using WordPart = uint32_t __attribute__((vector_size(BYTES)));
using HalfPart = uint16_t __attribute__((vector_size(BYTES / 2)));

using F = Sixteen<FloatPart>;
using U = Sixteen<WordPart>;
using H = Sixteen<HalfPart>;

// Vectors of sums that registers hold beside what is multiplied.
#if defined(__AVX512F__)
constexpr int SUMS = 24;
#elif defined(__AVX__) || defined(__aarch64__)
constexpr int SUMS = 6;
#else
constexpr int SUMS = 3;
#endif
// Of rows whose sums are two vectors, or one where there is no room for more.
constexpr int ROWS_AT_ONCE = SUMS >= 24 ? SUMS / 2 : SUMS;
// Vectors that so many rows are multiplied with at a time: 1, 2 or 4.
constexpr int together(int rows) { return SUMS >= 4 * rows ? 4 : SUMS >= 2 * rows ? 2 : 1; }

template <class V>
constexpr bool halved = false;
template <class V>
constexpr bool halved<Two<V>> = true;

template <class V, class T>
INLINE V load(const T* from) {
    if constexpr (halved<V>) {
        using Half = decltype(V::lo);
        const auto* bytes = reinterpret_cast<const char*>(from);
        return {load<Half>(bytes), load<Half>(bytes + sizeof(Half))};
    } else {
        V v;
        memcpy(&v, from, sizeof v);
        return v;
    }
}
template <class V, class T>
INLINE void store(T* to, V v) {
    if constexpr (halved<V>) {
        auto* bytes = reinterpret_cast<char*>(to);
        store(bytes, v.lo);
        store(bytes + sizeof v.lo, v.hi);
    } else {
        memcpy(to, &v, sizeof v);
    }
}
template <class V, class S>
INLINE V filled(S x) {
    if constexpr (halved<V>) {
        const auto half = filled<decltype(V::lo)>(x);
        return {half, half};
    } else {
        return V{} + x;
    }
}
INLINE F splat(float x) { return filled<F>(x); }
INLINE U splat(uint32_t x) { return filled<U>(x); }
// The same of a word in memory, as one load: what GCC makes of it passes through a register of integers as soon as it is shifted.
INLINE U spread(const uint32_t* at) {
#if defined(__AVX__) && !defined(__AVX512F__)
    WordPart half;
    __asm__ volatile("vbroadcastss %1, %0" : "=x"(half) : "m"(*at));
    return {half, half};
#else
    return splat(*at);
#endif
}

#define BOTH_HALVES(OPERATOR)                                                                    \
    template <class V>                                                                           \
    INLINE Two<V> operator OPERATOR(Two<V> a, Two<V> b) {                                        \
        return {a.lo OPERATOR b.lo, a.hi OPERATOR b.hi};                                         \
    }                                                                                            \
    template <class V, class S, class = std::enable_if_t<std::is_arithmetic_v<S>>>               \
    INLINE Two<V> operator OPERATOR(Two<V> a, S b) {                                             \
        return {a.lo OPERATOR b, a.hi OPERATOR b};                                               \
    }                                                                                            \
    template <class V>                                                                           \
    INLINE Two<V>& operator OPERATOR##=(Two<V>& a, Two<V> b) {                                   \
        return a = a OPERATOR b;                                                                 \
    }                                                                                            \
    template <class V, class S, class = std::enable_if_t<std::is_arithmetic_v<S>>>               \
    INLINE Two<V>& operator OPERATOR##=(Two<V>& a, S b) {                                        \
        return a = a OPERATOR b;                                                                 \
    }
BOTH_HALVES(+)
BOTH_HALVES(-)
BOTH_HALVES(*)
BOTH_HALVES(/)
BOTH_HALVES(&)
BOTH_HALVES(|)
BOTH_HALVES(<<)
BOTH_HALVES(>>)
#undef BOTH_HALVES

INLINE FloatPart bits(WordPart v) { return reinterpret_cast<FloatPart>(v); }
INLINE WordPart bits(FloatPart v) { return reinterpret_cast<WordPart>(v); }
template <class V>
INLINE auto bits(Two<V> v) {
    return Two<decltype(bits(v.lo))>{bits(v.lo), bits(v.hi)};
}
// 16 bits into the lower half of a lane, and back.
INLINE WordPart wide(HalfPart v) { return __builtin_convertvector(v, WordPart); }
INLINE HalfPart narrow(WordPart v) { return __builtin_convertvector(v, HalfPart); }
template <class V>
INLINE auto wide(Two<V> v) {
    return Two<decltype(wide(v.lo))>{wide(v.lo), wide(v.hi)};
}
template <class V>
INLINE auto narrow(Two<V> v) {
    return Two<decltype(narrow(v.lo))>{narrow(v.lo), narrow(v.hi)};
}

INLINE FloatPart larger(FloatPart a, FloatPart b) { return a > b ? a : b; }
INLINE FloatPart smaller(FloatPart a, FloatPart b) { return a < b ? a : b; }
// v where `at` is at least `least`, else 0.
INLINE FloatPart from_on(FloatPart at, float least, FloatPart v) { return at >= filled<FloatPart>(least) ? v : FloatPart{}; }
template <class V>
INLINE Two<V> larger(Two<V> a, Two<V> b) {
    return {larger(a.lo, b.lo), larger(a.hi, b.hi)};
}
template <class V>
INLINE Two<V> smaller(Two<V> a, Two<V> b) {
    return {smaller(a.lo, b.lo), smaller(a.hi, b.hi)};
}
template <class V>
INLINE Two<V> from_on(Two<V> at, float least, Two<V> v) {
    return {from_on(at.lo, least, v.lo), from_on(at.hi, least, v.hi)};
}

INLINE float sum(FloatPart v) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps(reinterpret_cast<__m512>(v));
#else
    float s = v[0];
    for (int i = 1; i < BYTES / 4; ++i) s += v[i];
    return s;
#endif
}
INLINE float largest(FloatPart v) {
#ifdef __AVX512F__
    return _mm512_reduce_max_ps(reinterpret_cast<__m512>(v));
#else
    float m = v[0];
    for (int i = 1; i < BYTES / 4; ++i) m = v[i] > m ? v[i] : m;
    return m;
#endif
}
template <class V>
INLINE float sum(Two<V> v) {
    return sum(v.lo + v.hi);
}
template <class V>
INLINE float largest(Two<V> v) {
    return largest(larger(v.lo, v.hi));
}

}  // namespace baton

// Vectors of floats, as wide as the instruction set this file is compiled for: 16 lanes (AVX-512), 8 (AVX2), else 4.
//
// GCC's and clang's vector extensions do the arithmetic, so that one source serves every instruction set; intrinsics
// only where the extensions have no word for it. Everything is in an unnamed namespace: the same source is compiled
// several times, and two libraries of one process must never share a symbol.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

struct bf16 {
    uint16_t bits;
};

// Not vf{} + x, which is an addition: 0 + x is another number than x for -0.
#if defined(__AVX512F__)
inline vf splat(float x) { return (vf)_mm512_set1_ps(x); }
#elif defined(__AVX2__)
inline vf splat(float x) { return (vf)_mm256_set1_ps(x); }
#else
inline vf splat(float x) { return vf{x, x, x, x}; }
#endif
inline vf max(vf a, vf b) { return a > b ? a : b; }

// a * b + c, rounded once where the instruction set can. Written so, not left to the compiler, where several loops must
// come to the same bits.
#if defined(__AVX512F__)
inline vf fused(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#elif defined(__AVX2__) && defined(__FMA__)
inline vf fused(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#else
inline vf fused(vf a, vf b, vf c) { return a * b + c; }
#endif

#if defined(__AVX512F__)
inline vf widen(vh x) { return (vf)((vu)_mm512_cvtepu16_epi32((__m256i)x) << 16); }  // GCC converts in halves
#else
inline vf widen(vh x) { return (vf)(__builtin_convertvector(x, vu) << 16); }
#endif

// To the nearest, ties to even, as torch rounds; NaN stays NaN.
inline vh narrow(vf x) {
    vu bits = (vu)x;
    vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    vu nan = vu{} + 0x7fc0;
    return __builtin_convertvector(x == x ? rounded : nan, vh);
}

inline vf load(const float* p) {
    vf x;
    memcpy(&x, p, sizeof x);
    return x;
}
inline vf load(const bf16* p) {
    vh x;
    memcpy(&x, p, sizeof x);
    return widen(x);
}
#if defined(__AVX512F__)
inline vf load(const int8_t* p) {
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
#else
inline vf load(const int8_t* p) {
    int8_t lanes __attribute__((vector_size(W)));
    memcpy(&lanes, p, sizeof lanes);
    return __builtin_convertvector(__builtin_convertvector(lanes, vi), vf);
}
#endif
inline void store(float* p, vf x) { memcpy(p, &x, sizeof x); }
inline void store(bf16* p, vf x) {
    vh h = narrow(x);
    memcpy(p, &h, sizeof h);
}

// The first n < W lanes; a load leaves 0 in the others and never touches memory behind them.
#if defined(__AVX512F__)
inline vf load(const float* p, int n) { return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
inline vf load(const bf16* p, int n) { return widen((vh)_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p)); }
inline vf load(const int8_t* p, int n) {
    __m128i bytes = _mm_maskz_loadu_epi8((__mmask16)((1u << n) - 1), p);
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
inline void store(float* p, vf x, int n) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)x); }
inline void store(bf16* p, vf x, int n) {
    _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), (__m256i)narrow(x));
}
#else
template <class T> inline vf load(const T* p, int n) {
    T lanes[W] = {};
    for (int i = 0; i < n; i++) lanes[i] = p[i];
    return load(lanes);
}
template <class T> inline void store(T* p, vf x, int n) {
    T lanes[W];
    store(lanes, x);
    for (int i = 0; i < n; i++) p[i] = lanes[i];
}
#endif

// The i-th vector of n values, whole or the last part of one.
template <class T> inline vf load_at(const T* p, int64_t i, int64_t n) {
    return i + W <= n ? load(p + i) : load(p + i, (int)(n - i));
}
template <class T> inline void store_at(T* p, int64_t i, int64_t n, vf x) {
    if (i + W <= n)
        store(p + i, x);
    else
        store(p + i, x, (int)(n - i));
}

// Interleave: a0 b0 a1 b1 … of the lower and of the upper half.
#if defined(__clang__)
#define OCTAVO_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define OCTAVO_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vi{__VA_ARGS__})
#endif
inline vf zip_low(vf a, vf b) {
#if defined(__AVX512F__)
    return OCTAVO_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif defined(__AVX2__)
    return OCTAVO_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
    return OCTAVO_SHUFFLE(a, b, 0, 4, 1, 5);
#endif
}
inline vf zip_high(vf a, vf b) {
#if defined(__AVX512F__)
    return OCTAVO_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
    return OCTAVO_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
    return OCTAVO_SHUFFLE(a, b, 2, 6, 3, 7);
#endif
}
#undef OCTAVO_SHUFFLE

// Lane i of x[j] changes places with lane j of x[i].
#if defined(__AVX512F__)
// Blocks of 4 within 128-bit lanes, then the lanes: shuffles within lanes are the cheap ones.
inline void transpose(vf (&x)[W]) {
    __m512 t[W];
    for (int g = 0; g < W; g += 4) {
        __m512 a = (__m512)x[g], b = (__m512)x[g + 1], c = (__m512)x[g + 2], d = (__m512)x[g + 3];
        __m512d low_ab = (__m512d)_mm512_unpacklo_ps(a, b), low_cd = (__m512d)_mm512_unpacklo_ps(c, d);
        __m512d high_ab = (__m512d)_mm512_unpackhi_ps(a, b), high_cd = (__m512d)_mm512_unpackhi_ps(c, d);
        t[g] = (__m512)_mm512_unpacklo_pd(low_ab, low_cd);
        t[g + 1] = (__m512)_mm512_unpackhi_pd(low_ab, low_cd);
        t[g + 2] = (__m512)_mm512_unpacklo_pd(high_ab, high_cd);
        t[g + 3] = (__m512)_mm512_unpackhi_pd(high_ab, high_cd);
    }
    for (int m = 0; m < 4; m++) {
        __m512 a = t[m], b = t[4 + m], c = t[8 + m], d = t[12 + m];
        __m512 low_a = _mm512_shuffle_f32x4(a, b, 0x44), low_b = _mm512_shuffle_f32x4(c, d, 0x44);
        __m512 high_a = _mm512_shuffle_f32x4(a, b, 0xee), high_b = _mm512_shuffle_f32x4(c, d, 0xee);
        x[m] = (vf)_mm512_shuffle_f32x4(low_a, low_b, 0x88);
        x[4 + m] = (vf)_mm512_shuffle_f32x4(low_a, low_b, 0xdd);
        x[8 + m] = (vf)_mm512_shuffle_f32x4(high_a, high_b, 0x88);
        x[12 + m] = (vf)_mm512_shuffle_f32x4(high_a, high_b, 0xdd);
    }
}
#else
// Each step moves a bit of the place's row number to its column.
inline void transpose(vf (&x)[W]) {
    for (int step = 1; step < W; step *= 2) {
        vf y[W];
        for (int i = 0; i < W / 2; i++) {
            y[2 * i] = zip_low(x[i], x[i + W / 2]);
            y[2 * i + 1] = zip_high(x[i], x[i + W / 2]);
        }
        for (int i = 0; i < W; i++) x[i] = y[i];
    }
}
#endif

// Lane i of the result is the sum of the lanes of x[i]. Halving the number of vectors W times log2 W costs about 3
// operations per sum, a sum on its own about 8. Overwrites x.
inline vf sum_each(vf (&x)[W]) {
    for (int n = W / 2; n > 0; n /= 2)
        for (int i = 0; i < n; i++) x[i] = zip_low(x[i], x[i + n]) + zip_high(x[i], x[i + n]);
    return x[0];
}

// Lane i of the result is lane i + n of x, for i < n.
template <int n> inline vf upper(vf x) {
#if defined(__AVX512F__)
    if constexpr (n == 8) return (vf)_mm512_shuffle_f32x4((__m512)x, (__m512)x, 0xee);
    if constexpr (n == 4) return (vf)_mm512_shuffle_f32x4((__m512)x, (__m512)x, 0x55);
    return (vf)_mm512_permute_ps((__m512)x, n == 2 ? 0xee : 0x55);
#else
    vf y = x;
    for (int i = 0; i < n; i++) y[i] = x[i + n];
    return y;
#endif
}

// By halves: lane i and lane i + n, for n = W/2, W/4, … 1.
inline float sum_lanes(vf x) {
    if constexpr (W >= 16) x += upper<8>(x);
    if constexpr (W >= 8) x += upper<4>(x);
    x += upper<2>(x);
    x += upper<1>(x);
    return x[0];
}
inline float max_lanes(vf x) {
    if constexpr (W >= 16) x = max(upper<8>(x), x);
    if constexpr (W >= 8) x = max(upper<4>(x), x);
    x = max(upper<2>(x), x);
    x = max(upper<1>(x), x);
    return x[0];
}

// e^x to 2 units in the last place; 0 below -87.3, 2.4e38 above 88.3, NaN for NaN.
inline vf exp(vf x) {
    vf lowest = splat(-87.3f), highest = splat(88.3f);
    vf clamped = x > highest ? highest : (x < lowest ? lowest : x);
    const float magic = 12582912.f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    vf shifted = clamped * 1.44269504f + magic;
    vf n = shifted - magic;
    vf r = clamped - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts; |r| <= ln 2 / 2
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.f;
    vf result = (vf)((vi)p + ((vi)shifted << 23));
    return x < lowest ? vf{} : result;
}

// Absolute error about 1e-7.
inline vf tanh(vf x) { return 1.f - 2.f / (exp(2.f * x) + 1.f); }

}  // namespace

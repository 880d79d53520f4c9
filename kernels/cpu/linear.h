// Linear layers over packed matrices. Contract: kernels/ops.py; layout: kernels/cpu/pack.py, which writes it.
//
// A matrix [N, K] lies in panels of 32 outputs, each panel along K, so that a thread reads one stream of memory and a
// vector holds one input's weights for neighbouring outputs. A tile is up to R rows of x times one panel: its sums stay
// in registers from the first input to the last. Every output is therefore one sum in the order of K (of groups, and
// of inputs within a group), whatever the number of rows or threads: the same bits alone and in a batch.
//
//   numbers: float32, bfloat16 (two inputs side by side) or float8 e4m3 (four), widened in registers.
//   codes:   8 or 4 bits, four inputs side by side; x is rounded to int8 with one scale per row and group, the products
//            of a group are summed exactly in int32, then scaled. Codes are unsigned: their zero is taken off the sums.
//
// In a pass a tile covers 2 vectors of the panel's outputs: those at pass * W and at 16 + pass * W, because a byte of
// 4-bit codes holds outputs o and o + 16.

#pragma once

#include <cmath>
#include <type_traits>

#include "simd.h"
#include "team.h"

#define OCTAVO_UNROLL _Pragma("GCC unroll 16")

namespace {

constexpr int PANEL = 32;
constexpr int PASSES = 16 / W;
#if defined(__AVX512F__)
constexpr int FLOAT_ROWS = 12, GROUP_ROWS = 6;  // as many as 32 registers hold
#else
constexpr int FLOAT_ROWS = 4, GROUP_ROWS = 2;  // 16 registers
#endif

enum Form : int64_t { FLOAT32, BFLOAT16, FLOAT8, CODES8, CODES4 };

struct Linear {
    void* out;            // [rows, outputs]
    const void* x;        // [rows, inputs]
    const char* weight;   // panels
    const void* bias;     // [outputs] in x's type, or null
    int64_t rows, inputs, outputs, x_stride, out_stride;
    int64_t x_bf16, form;
    int64_t group_size;   // of scaled forms, padded to whole steps of K
    int64_t groups;
    int64_t scales_half;  // scales and minima are float16, else float32
    int64_t has_mins, zero;
    int64_t threads;

    bool scaled() const { return form >= FLOAT8; }
    bool codes() const { return form >= CODES8; }
    int64_t panels() const { return (outputs + PANEL - 1) / PANEL; }
    int64_t depth() const { return scaled() ? groups * group_size : (inputs + 1) / 2 * 2; }  // K with its padding
    int64_t scale_bytes() const { return PANEL * (scales_half ? 2 : 4); }
    int64_t code_bytes() const { return group_size * PANEL / (form == CODES4 ? 2 : 1); }
    int64_t group_bytes() const { return scale_bytes() * (has_mins ? 2 : 1) + code_bytes(); }
    int64_t panel_bytes() const {
        return scaled() ? groups * group_bytes() : depth() * PANEL * (form == FLOAT32 ? 4 : 2);
    }
};

// ---------------------------------------------------------------- rows of x, laid out for a tile

// Some rows of x as a tile reads them: `step` inputs of row 0, the same of row 1, …, then the next inputs.
// Of codes also: scales [groups, rows] and sums [groups, rows] of the rounded values.
struct Tile {
    int64_t first, rows;
    char* values;
    float* scales;
    int32_t* sums;
};

// To the nearest, ties to even. Not by adding 1.5 * 2^23: the compiler would merge that sum with a product before it.
inline vi round_to_int(vf x) {
#if defined(__AVX512F__)
    return (vi)_mm512_cvtps_epi32((__m512)x);
#elif defined(__AVX2__)
    return (vi)_mm256_cvtps_epi32((__m256)x);
#else
    vi q;
    for (int l = 0; l < W; l++) q[l] = (int32_t)__builtin_nearbyintf(x[l]);
    return q;
#endif
}

inline vf absolute(vf x) { return (vf)((vi)x & 0x7fffffff); }

// One row of one tile, rounded to int8 group by group: |x| at most 127 units of the group's scale.
template <class T> inline void round_row(const Linear& a, const T* x, const Tile& tile, int64_t r) {
    int64_t rows = tile.rows, size = a.group_size;
    for (int64_t g = 0; g < a.groups; g++) {
        int64_t first = g * size, n = a.inputs - first < size ? a.inputs - first : size;
        vf largest{}, poison{};
        for (int64_t i = 0; i < n; i += W) {
            vf v = load_at(x + first, i, n);
            largest = max(largest, absolute(v));
            poison += v * 0.f;  // NaN where v is not finite
        }
        float top = max_lanes(largest), inverse = 127.f / top;
        bool rounds = inverse < INFINITY;  // not if all is 0, or as good as 0
        float scale = (rounds ? top / 127.f : 0.f) + sum_lanes(poison);
        if (!rounds) inverse = 0.f;
        vi sum{};
        char* to = tile.values + first * rows + r * 4;
        for (int64_t i = 0; i < size; i += W) {
            vi q = i < n ? round_to_int(load_at(x + first, i, n) * inverse) : vi{};
            sum += q;
            int8_t bytes[W];
#if defined(__AVX512F__)
            _mm_storeu_si128((__m128i*)bytes, _mm512_cvtepi32_epi8((__m512i)q));
#else
            for (int l = 0; l < W; l++) bytes[l] = (int8_t)q[l];
#endif
            for (int l = 0; l < W && i + l < size; l += 4) memcpy(to + (i + l) * rows, bytes + l, 4);
        }
        int32_t lanes[W], total = 0;
        memcpy(lanes, &sum, sizeof sum);
        for (int l = 0; l < W; l++) total += lanes[l];
        tile.scales[g * rows + r] = scale;
        tile.sums[g * rows + r] = total;
    }
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

// One row of one tile as float32, one input at a time.
template <class T> inline void widen_row(const Linear& a, const T* x, const Tile& tile, int64_t r) {
    float* to = (float*)tile.values + r;
    int64_t rows = tile.rows, k = 0;
    for (; k < a.inputs; k++) to[k * rows] = to_float(x[k]);
    for (; k < a.depth(); k++) to[k * rows] = 0.f;
}

// One row of one tile as bfloat16, two inputs at a time.
inline void pair_row(const Linear& a, const bf16* x, const Tile& tile, int64_t r) {
    uint32_t* to = (uint32_t*)tile.values + r;
    int64_t rows = tile.rows, k = 0;
    for (; k + 2 <= a.inputs; k += 2) memcpy(to + k / 2 * rows, x + k, 4);
    if (k < a.inputs) to[k / 2 * rows] = x[k].bits;
}

// ---------------------------------------------------------------- products

#if defined(__AVX512BF16__)
constexpr bool PAIRS = true;
#else
constexpr bool PAIRS = false;
#endif

// acc[o] += the 4 unsigned bytes of w[o] times the 4 signed bytes of x, exactly. `Bits` bounds the unsigned ones.
template <int Bits> inline vi dot4(vi acc, vi w, vi x) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
#elif defined(__AVX512BW__)
    if (Bits == 4) {
        __m512i pairs = _mm512_maddubs_epi16((__m512i)w, (__m512i)x);
        return acc + (vi)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
    }
    __m512i even = _mm512_and_si512((__m512i)w, _mm512_set1_epi16(0xff)), odd = _mm512_srli_epi16((__m512i)w, 8);
    __m512i x_even = _mm512_srai_epi16(_mm512_slli_epi16((__m512i)x, 8), 8), x_odd = _mm512_srai_epi16((__m512i)x, 8);
    return acc + (vi)_mm512_madd_epi16(even, x_even) + (vi)_mm512_madd_epi16(odd, x_odd);
#elif defined(__AVX2__)
    if (Bits == 4) {
        __m256i pairs = _mm256_maddubs_epi16((__m256i)w, (__m256i)x);
        return acc + (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }
    __m256i even = _mm256_and_si256((__m256i)w, _mm256_set1_epi16(0xff)), odd = _mm256_srli_epi16((__m256i)w, 8);
    __m256i x_even = _mm256_srai_epi16(_mm256_slli_epi16((__m256i)x, 8), 8), x_odd = _mm256_srai_epi16((__m256i)x, 8);
    return acc + (vi)_mm256_madd_epi16(even, x_even) + (vi)_mm256_madd_epi16(odd, x_odd);
#else
    for (int j = 0; j < 4; j++) acc += (vi)((vu)w >> (8 * j) & 0xff) * ((x << (24 - 8 * j)) >> 24);
    return acc;
#endif
}

inline vi load_bytes(const char* p) {
    vi x;
    memcpy(&x, p, sizeof x);
    return x;
}

// W values of a row of scales.
inline vf load_scales(const char* p, int64_t at, bool half) {
    if (!half) return load((const float*)p + at);
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(p + 2 * at)));
#else
    vh bits;
    memcpy(&bits, p + 2 * at, sizeof bits);
    vu wide = __builtin_convertvector(bits, vu);
    // Exponents are rebased by a product, which does subnormals as well.
    vf magnitude = (vf)((wide & 0x7fff) << 13) * 5.192296858534828e33f;
    vu special = (vu)((vi)(wide & 0x7c00) == 0x7c00);  // infinity, NaN
    vu result = ((vu)magnitude | (special & 0x7f800000)) | ((wide & 0x8000) << 16);
    return (vf)result;
#endif
}

// The tile's sums of one pass: [R][2] vectors.
template <int R> struct Sums {
    vf at[R][2];
};

template <int R> inline void store_sums(const Linear& a, const Tile& tile, int64_t panel, int pass, Sums<R>& sums) {
    for (int v = 0; v < 2; v++) {
        int64_t output = panel * PANEL + 16 * v + pass * W, left = a.outputs - output;
        if (left <= 0) continue;
        int n = left < W ? (int)left : W;
        auto put = [&](auto* out, auto* bias) {
            vf add{};
            if (bias != nullptr) add = n == W ? load(bias + output) : load(bias + output, n);
            OCTAVO_UNROLL for (int r = 0; r < R; r++) {
                auto* to = out + (tile.first + r) * a.out_stride + output;
                if (n == W)
                    store(to, sums.at[r][v] + add);
                else
                    store(to, sums.at[r][v] + add, n);
            }
        };
        if (a.x_bf16)
            put((bf16*)a.out, (const bf16*)a.bias);
        else
            put((float*)a.out, (const float*)a.bias);
    }
}

template <int R> inline void times_float32(const Linear& a, const Tile& tile, const char* panel, int pass, Sums<R>& s) {
    const float* x = (const float*)tile.values;
    const float* w = (const float*)panel + pass * W;
    vf acc[R][2] = {};
    for (int64_t k = 0; k < a.inputs; k++, x += R, w += PANEL) {
        vf low = load(w), high = load(w + 16);
        OCTAVO_UNROLL for (int r = 0; r < R; r++) {
            vf each = splat(x[r]);
            acc[r][0] += each * low, acc[r][1] += each * high;
        }
    }
    memcpy(s.at, acc, sizeof acc);
}

template <int R> inline void times_bfloat16(const Linear& a, const Tile& tile, const char* panel, int pass, Sums<R>& s) {
    const float* x = (const float*)tile.values;
    const char* w = panel + pass * W * 4;
    vf acc[R][2] = {};
    for (int64_t k = 0; k < a.depth(); k += 2, x += 2 * R, w += 4 * PANEL) {
        vi low = load_bytes(w), high = load_bytes(w + 64);
        vf low_even = (vf)(low << 16), high_even = (vf)(high << 16);
        OCTAVO_UNROLL for (int r = 0; r < R; r++) {
            vf each = splat(x[r]);
            acc[r][0] += each * low_even, acc[r][1] += each * high_even;
        }
        vf low_odd = (vf)(low & (int32_t)0xffff0000), high_odd = (vf)(high & (int32_t)0xffff0000);
        OCTAVO_UNROLL for (int r = 0; r < R; r++) {
            vf each = splat(x[R + r]);
            acc[r][0] += each * low_odd, acc[r][1] += each * high_odd;
        }
    }
    memcpy(s.at, acc, sizeof acc);
}

// Both in bfloat16, two products at a time.
template <int R> inline void times_pairs(const Linear& a, const Tile& tile, const char* panel, Sums<R>& s) {
#if defined(__AVX512BF16__)
    const int32_t* x = (const int32_t*)tile.values;
    const char* w = panel;
    vf acc[R][2] = {};
    for (int64_t k = 0; k < a.depth(); k += 2, x += R, w += 4 * PANEL) {
        vi low = load_bytes(w), high = load_bytes(w + 64);
        OCTAVO_UNROLL for (int r = 0; r < R; r++) {
            vi each = vi{} + x[r];
            acc[r][0] = (vf)_mm512_dpbf16_ps((__m512)acc[r][0], (__m512bh)each, (__m512bh)low);
            acc[r][1] = (vf)_mm512_dpbf16_ps((__m512)acc[r][1], (__m512bh)each, (__m512bh)high);
        }
    }
    memcpy(s.at, acc, sizeof acc);
#endif
}

// Four e4m3 bytes per output; byte j. Exact: exponents are rebased by a product, which does subnormals as well.
inline vf widen_float8(vi bytes, int j) {
    vi bits = bytes << (24 - 8 * j);
    return (vf)((bits & (int32_t)0x80000000) | ((vi)((vu)bits >> 4) & 0x07f00000)) * 1.329227995784916e36f;
}

template <int R> inline void times_float8(const Linear& a, const Tile& tile, const char* panel, int pass, Sums<R>& s) {
    const float* x = (const float*)tile.values;
    OCTAVO_UNROLL for (int r = 0; r < R; r++) s.at[r][0] = s.at[r][1] = vf{};
    for (int64_t g = 0; g < a.groups; g++, panel += a.group_bytes()) {
        const char* w = panel + a.scale_bytes() + pass * W * 4;
        vf acc[R][2] = {};
        for (int64_t k = 0; k < a.group_size; k += 4, w += 4 * PANEL) {
            vi low = load_bytes(w), high = load_bytes(w + 64);
            for (int j = 0; j < 4; j++, x += R) {
                vf low_j = widen_float8(low, j), high_j = widen_float8(high, j);
                OCTAVO_UNROLL for (int r = 0; r < R; r++) {
                    vf each = splat(x[r]);
                    acc[r][0] += each * low_j, acc[r][1] += each * high_j;
                }
            }
        }
        for (int v = 0; v < 2; v++) {
            vf scale = load_scales(panel, 16 * v + pass * W, a.scales_half);
            OCTAVO_UNROLL for (int r = 0; r < R; r++) s.at[r][v] += acc[r][v] * scale;
        }
    }
}

template <int R, int Bits, bool Half, bool Mins>
inline void times_codes(const Linear& a, const Tile& tile, const char* panel, int pass, Sums<R>& s) {
    const int32_t* x = (const int32_t*)tile.values;
    int64_t group_bytes = a.group_bytes(), head = a.scale_bytes() * (Mins ? 2 : 1), steps = a.group_size / 4;
    vf total[R][2] = {};
    for (int64_t g = 0; g < a.groups; g++, panel += group_bytes) {
        const char* w = panel + head + pass * W * 4;
        vi acc[R][2];
        OCTAVO_UNROLL for (int r = 0; r < R; r++) acc[r][0] = acc[r][1] = vi{} - (int32_t)a.zero * tile.sums[g * R + r];
        for (int64_t k = 0; k < steps; k++, x += R) {
            vi low, high;
            if (Bits == 4) {
                vi both = load_bytes(w);
                low = both & 0x0f0f0f0f, high = (both >> 4) & 0x0f0f0f0f;
                w += 2 * PANEL;
            } else {
                low = load_bytes(w), high = load_bytes(w + 64);
                w += 4 * PANEL;
            }
            OCTAVO_UNROLL for (int r = 0; r < R; r++) {
                vi each = vi{} + x[r];
                acc[r][0] = dot4<Bits>(acc[r][0], low, each), acc[r][1] = dot4<Bits>(acc[r][1], high, each);
            }
        }
        for (int v = 0; v < 2; v++) {
            vf scale = load_scales(panel, 16 * v + pass * W, Half);
            vf minimum{};
            if (Mins) minimum = load_scales(panel + a.scale_bytes(), 16 * v + pass * W, Half);
            OCTAVO_UNROLL for (int r = 0; r < R; r++) {
                float of_x = tile.scales[g * R + r];
                total[r][v] += __builtin_convertvector(acc[r][v], vf) * (scale * of_x);
                if (Mins) total[r][v] += minimum * ((float)tile.sums[g * R + r] * of_x);
            }
        }
    }
    memcpy(s.at, total, sizeof total);
}

// ---------------------------------------------------------------- one tile times one panel

using TileTimesPanel = void (*)(const Linear&, const Tile&, int64_t panel);

// `Product` is a functor template: what to do in one pass.
template <int R, class Product> void tile_times_panel(const Linear& a, const Tile& tile, int64_t panel) {
    for (int pass = 0; pass < PASSES; pass++) {
        Sums<R> sums;
        Product::template run<R>(a, tile, a.weight + panel * a.panel_bytes(), pass, sums);
        store_sums<R>(a, tile, panel, pass, sums);
    }
}

struct Float32 {
    template <int R> static void run(const Linear& a, const Tile& t, const char* p, int pass, Sums<R>& s) {
        times_float32<R>(a, t, p, pass, s);
    }
};
struct Bfloat16 {
    template <int R> static void run(const Linear& a, const Tile& t, const char* p, int pass, Sums<R>& s) {
        times_bfloat16<R>(a, t, p, pass, s);
    }
};
struct Pairs {
    template <int R> static void run(const Linear& a, const Tile& t, const char* p, int, Sums<R>& s) {
        times_pairs<R>(a, t, p, s);
    }
};
struct Float8 {
    template <int R> static void run(const Linear& a, const Tile& t, const char* p, int pass, Sums<R>& s) {
        times_float8<R>(a, t, p, pass, s);
    }
};
template <int Bits, bool Half, bool Mins> struct Codes {
    template <int R> static void run(const Linear& a, const Tile& t, const char* p, int pass, Sums<R>& s) {
        times_codes<R, Bits, Half, Mins>(a, t, p, pass, s);
    }
};

template <class Product, int R> TileTimesPanel for_rows(int64_t rows) {
    if constexpr (R == 0)
        return nullptr;
    else
        return rows == R ? &tile_times_panel<R, Product> : for_rows<Product, R - 1>(rows);
}

template <int Bits> TileTimesPanel for_codes(const Linear& a, int64_t rows) {
    if (a.scales_half)
        return a.has_mins ? for_rows<Codes<Bits, true, true>, GROUP_ROWS>(rows)
                          : for_rows<Codes<Bits, true, false>, GROUP_ROWS>(rows);
    return a.has_mins ? for_rows<Codes<Bits, false, true>, GROUP_ROWS>(rows)
                      : for_rows<Codes<Bits, false, false>, GROUP_ROWS>(rows);
}

inline TileTimesPanel pick(const Linear& a, int64_t rows) {
    switch (a.form) {
        case FLOAT32: return for_rows<Float32, FLOAT_ROWS>(rows);
        case BFLOAT16:
            return PAIRS && a.x_bf16 ? for_rows<Pairs, FLOAT_ROWS>(rows) : for_rows<Bfloat16, FLOAT_ROWS>(rows);
        case FLOAT8: return for_rows<Float8, GROUP_ROWS>(rows);
        case CODES8: return for_codes<8>(a, rows);
        default: return for_codes<4>(a, rows);
    }
}

// ---------------------------------------------------------------- the whole product

// What x takes per row when laid out for tiles.
struct RowBytes {
    int64_t values, scales;

    explicit RowBytes(const Linear& a) {
        bool pairs = PAIRS && a.form == BFLOAT16 && a.x_bf16;
        values = a.depth() * (a.codes() ? 1 : pairs ? 2 : 4);
        scales = a.codes() ? a.groups * 8 : 0;
    }
    int64_t all() const { return values + scales; }
};

inline void lay_out(const Linear& a, const Tile& tile) {
    for (int64_t r = 0; r < tile.rows; r++) {
        int64_t at = (tile.first + r) * a.x_stride;
        if (a.x_bf16) {
            const bf16* x = (const bf16*)a.x + at;
            if (a.codes())
                round_row(a, x, tile, r);
            else if (PAIRS && a.form == BFLOAT16)
                pair_row(a, x, tile, r);
            else
                widen_row(a, x, tile, r);
        } else if (a.codes())
            round_row(a, (const float*)a.x + at, tile, r);
        else
            widen_row(a, (const float*)a.x + at, tile, r);
    }
}

constexpr int64_t ROWS_BYTES = 1 << 20;      // of x laid out at a time, so that they stay in a cache
constexpr int64_t ALONE_BYTES = 1 << 15;     // below it, laying out x is not worth sharing
constexpr int64_t SMALL_PRODUCT = 1 << 16;   // bytes of weights times tiles below which the caller works alone

// Rows [first, last) of x: lay them out, then multiply, panels and tiles shared among the threads.
inline void multiply_rows(const Linear& a, int64_t first, int64_t last, Scratch& scratch) {
    RowBytes bytes(a);
    int64_t most = a.scaled() ? GROUP_ROWS : FLOAT_ROWS;
    int64_t rows = last - first, tiles = (rows + most - 1) / most;
    char* memory = scratch.get<char>(rows * bytes.all() + tiles * 64);
    auto tile_at = [&](int64_t i) {
        Tile tile;
        int64_t begin = rows * i / tiles, end = rows * (i + 1) / tiles;  // tiles of nearly the same size
        tile.first = first + begin, tile.rows = end - begin;
        tile.values = memory + (begin * bytes.all() + i * 64 + 63) / 64 * 64;
        tile.scales = (float*)(tile.values + tile.rows * bytes.values);
        tile.sums = (int32_t*)(tile.scales + tile.rows * (a.codes() ? a.groups : 0));
        return tile;
    };
    int lay_out_threads = rows * bytes.all() < ALONE_BYTES ? 1 : (int)a.threads;
    share(tiles, lay_out_threads, [&](int64_t i) { lay_out(a, tile_at(i)); });

    int64_t panels = a.panels(), threads = a.threads;
    if (panels * a.panel_bytes() * tiles < SMALL_PRODUCT) threads = 1;
    // Enough parts that a thread which was held up leaves work to the others, each long enough to stream.
    int64_t panel_parts = smaller(panels, threads * 4);
    int64_t tile_parts = panel_parts < threads * 2 ? smaller(tiles, threads * 4) : 1;
    if (threads == 1) panel_parts = tile_parts = 1;
    TileTimesPanel more = pick(a, rows / tiles + 1), less = pick(a, rows / tiles);
    share(panel_parts * tile_parts, (int)threads, [&](int64_t i) {
        int64_t p = i / tile_parts, t = i % tile_parts;
        for (int64_t panel = panels * p / panel_parts; panel < panels * (p + 1) / panel_parts; panel++)
            for (int64_t n = tiles * t / tile_parts; n < tiles * (t + 1) / tile_parts; n++) {
                Tile tile = tile_at(n);
                (tile.rows > rows / tiles ? more : less)(a, tile, panel);
            }
    });
}

inline void linear(const Linear& a) {
    static thread_local Scratch scratch;
    int64_t most = a.scaled() ? GROUP_ROWS : FLOAT_ROWS;
    int64_t block = ROWS_BYTES / RowBytes(a).all() / most * most;
    if (block < most) block = most;
    for (int64_t first = 0; first < a.rows; first += block)
        multiply_rows(a, first, smaller(a.rows, first + block), scratch);
}

// ---------------------------------------------------------------- single outputs of the matrix, as numbers

inline float e4m3_to_float(uint8_t byte) { return widen_float8(vi{} + byte, 0)[0]; }

// The weights of one output: to[k] for every input.
template <class T> inline void expand_output(const Linear& a, int64_t output, T* to) {
    const char* panel = a.weight + output / PANEL * a.panel_bytes();
    int64_t o = output % PANEL;
    auto put = [&](int64_t k, float value) {
        if (k >= a.inputs) return;
        if constexpr (std::is_same_v<T, float>)
            to[k] = value;
        else
            store(to + k, splat(value), 1);
    };
    if (!a.scaled()) {
        for (int64_t k = 0; k < a.inputs; k++)
            put(k, a.form == FLOAT32 ? ((const float*)panel)[k * PANEL + o]
                                     : to_float(((const bf16*)panel)[k / 2 * 2 * PANEL + 2 * o + k % 2]));
        return;
    }
    for (int64_t g = 0; g < a.groups; g++, panel += a.group_bytes()) {
        float lanes[2][PANEL];
        for (int part = 0; part < (a.has_mins ? 2 : 1); part++)
            for (int i = 0; i < PANEL; i += W)
                store(lanes[part] + i, load_scales(panel + part * a.scale_bytes(), i, a.scales_half));
        float scale = lanes[0][o], minimum = a.has_mins ? lanes[1][o] : 0.f;
        const uint8_t* codes = (const uint8_t*)panel + a.group_bytes() - a.code_bytes();
        for (int64_t k = 0; k < a.group_size; k++) {
            float value;
            if (a.form == CODES4)
                value = (float)((codes[k / 4 * 64 + o % 16 * 4 + k % 4] >> (o / 16 * 4) & 15) - (int)a.zero);
            else if (a.form == CODES8)
                value = (float)((int)codes[k / 4 * 128 + o * 4 + k % 4] - (int)a.zero);
            else
                value = e4m3_to_float(codes[k / 4 * 128 + o * 4 + k % 4]);
            put(g * a.group_size + k, scale * value + minimum);
        }
    }
}

// out: [count, inputs] contiguous, in the type that a.x_bf16 says.
inline void embedding(const Linear& a, void* out, const int64_t* ids, int64_t count) {
    share_rows(count, a.inputs * 16, (int)a.threads, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++) {
            if (a.x_bf16)
                expand_output(a, ids[i], (bf16*)out + i * a.inputs);
            else
                expand_output(a, ids[i], (float*)out + i * a.inputs);
        }
    });
}

}  // namespace

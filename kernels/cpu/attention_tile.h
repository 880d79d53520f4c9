// What both ways of attention share: the call, a tile of it, where its K and V lie, and a softmax so far.
//
// Every output is one sum in one order, whatever else is in the step: the same bits alone or in a batch, as one token
// or within a chunk of a prompt, on any number of threads. The order:
//   score     over the components of K in turn; then times the key's scale, if the cache has scales
//   chunk     of CHUNK positions, counted from position 0: the maximum so far is raised once per chunk; W partial sums
//             of weights, of the positions n with the same n % W, are added by halves; then weight · V by position
//   part      of PART positions, counted from position 0: a softmax of its own, joined to those before it in turn
// What a query does not see adds an exact 0 to that, or is left out.

#pragma once

#include <cmath>
#include <limits>

#include "cache.h"
#include "simd.h"
#include "team.h"

namespace {

constexpr float INF = std::numeric_limits<float>::infinity();

constexpr int CHUNK = 64;   // a multiple of every W
constexpr int PART = 512;   // a multiple of CHUNK; what one thread takes of a long range, if there is little to share
constexpr int FEW_ROWS = 8; // up to here a tile goes the way of attention_few.h, else that of attention_many.h
constexpr int ROW_STEP = 16;  // there its rows are padded to a multiple of it

struct Attention {
    void* out;  // [T, Hq, D] contiguous
    const void* query;
    const void* keys;
    const void* values;
    const int32_t* tables;
    const int32_t* query_start;
    const int32_t* context_lens;
    int64_t query_stride, query_head_stride, keys_stride, values_stride, table_stride;
    int64_t sequences, query_heads, kv_heads, d, block_size;
    float scale;
    int64_t window;  // 0 = none
    float cap;       // 0 = none
    bool query_bf16;
    int threads;

    int group() const { return (int)(query_heads / kv_heads); }
    int64_t padded_d() const { return (d + W - 1) / W * W; }
};

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Some consecutive tokens of one sequence times the G query heads that read one KV head: its rows, token by token.
struct Item {
    int32_t sequence, kv_head;
    int64_t token;     // first of the tile, in the packed T
    int64_t tokens;
    int64_t position;  // of that token
    int64_t begin, end;  // positions to read: all the tile sees, or one part of that
    int32_t parts;     // of the tile, counted in its first part; 0 in the others
    float* partial;    // where a part's State goes; null = the tile is whole, its rows go to `out`

    int64_t rows(const Attention& a) const { return tokens * a.group(); }
    int64_t padded_rows(const Attention& a) const {
        int64_t n = rows(a);
        return n <= FEW_ROWS ? n : (n + ROW_STEP - 1) / ROW_STEP * ROW_STEP;
    }
    // Positions [low, high) that the tile's i-th token sees.
    int64_t high(int64_t i) const { return position + i + 1; }
    int64_t low(const Attention& a, int64_t i) const {
        return a.window > 0 && high(i) > a.window ? high(i) - a.window : 0;
    }
};

inline int64_t part_end(int64_t begin, int64_t end) { return smaller(end, (begin / PART + 1) * PART); }

// The rows of K and V of one chunk, those in [low, high) of it; other places hold one of these, legal to read.
template <class T> struct Chunk {
    const T* k[CHUNK];
    const T* v[CHUNK];
    float k_scales[SCALED<T> ? CHUNK : 1];
    float v_scales[SCALED<T> ? CHUNK : 1];
    int low, high;

    // first: a multiple of CHUNK. False: [begin, end) has nothing of that chunk, it is left as it was.
    bool locate(const Attention& a, const Item& item, int64_t first, int64_t begin, int64_t end) {
        if (first >= end) return false;
        low = (int)larger(0, begin - first), high = (int)smaller(CHUNK, end - first);
        const int32_t* table = a.tables + item.sequence * a.table_stride;
        int64_t head = item.kv_head * a.block_size * (a.d + ROW_TAIL<T>);
        int64_t column = (first + low) / a.block_size, offset = (first + low) % a.block_size;
        for (int n = low; n < high; column++, offset = 0) {
            const T* keys = (const T*)a.keys + table[column] * a.keys_stride + head;
            const T* values = (const T*)a.values + table[column] * a.values_stride + head;
            int stop = (int)smaller(high, n + a.block_size - offset);
            if constexpr (SCALED<T>) {
                const T* scales = keys + a.block_size * a.d;
                memcpy(k_scales + n, scales + offset * sizeof(float), (stop - n) * sizeof(float));
                scales = values + a.block_size * a.d;
                memcpy(v_scales + n, scales + offset * sizeof(float), (stop - n) * sizeof(float));
            }
            keys += offset * a.d, values += offset * a.d;
            for (; n < stop; n++, keys += a.d, values += a.d) k[n] = keys, v[n] = values;
        }
        for (int n = 0; n < low; n++) k[n] = k[low], v[n] = v[low];
        for (int n = high; n < CHUNK; n++) k[n] = k[low], v[n] = v[low];
        return true;
    }
};

// A softmax and its sums so far.
struct State {
    float* sums;     // [rows, padded_d]: weight · V
    float* maxima;   // [rows]
    float* weights;  // [rows]: their sum

    static int64_t size(int64_t rows, int64_t padded_d) { return rows * (padded_d + 2); }
    State(float* memory, int64_t rows, int64_t padded_d)
        : sums(memory), maxima(memory + rows * padded_d), weights(maxima + rows) {}

    void clear(int64_t rows, int64_t padded_d) const {
        memset(sums, 0, rows * padded_d * sizeof(float));
        for (int64_t r = 0; r < rows; r++) maxima[r] = -INF, weights[r] = 0;
    }

    // Adds the part that follows. A row of which either has seen nothing keeps the other's bits.
    void join(const State& next, int64_t rows, int64_t padded_d) const {
        for (int64_t r = 0; r < rows; r++) {
            float top = next.maxima[r] > maxima[r] ? next.maxima[r] : maxima[r];
            float shift = top == -INF ? 0.f : top;
            vf mine = exp(splat(maxima[r] - shift)), others = exp(splat(next.maxima[r] - shift));
            float* to = sums + r * padded_d;
            const float* from = next.sums + r * padded_d;
            for (int64_t i = 0; i < padded_d; i += W)
                store(to + i, fused(load(to + i), mine, load(from + i) * others));
            weights[r] = fused(splat(weights[r]), mine, splat(next.weights[r]) * others)[0];
            maxima[r] = top;
        }
    }
};

inline vf cap_scores(vf s, float cap) { return cap * tanh(s * (1.f / cap)); }

template <class T> inline void load_query_row(float* to, const T* from, int64_t d, int64_t padded, float scale) {
    int64_t i = 0;
    for (; i < d; i += W) store(to + i, load_at(from, i, d) * scale);
    for (; i < padded; i += W) store(to + i, vf{});
}

// Row r of the tile is token r / G, head r % G. Scaled and padded with zeros to padded_d.
inline void load_query(const Attention& a, const Item& item, float* to) {
    int64_t dp = a.padded_d();
    int g = a.group();
    for (int64_t r = 0; r < item.rows(a); r++) {
        int64_t place = (item.token + r / g) * a.query_stride + (item.kv_head * g + r % g) * a.query_head_stride;
        if (a.query_bf16)
            load_query_row(to + r * dp, (const bf16*)a.query + place, a.d, dp, a.scale);
        else
            load_query_row(to + r * dp, (const float*)a.query + place, a.d, dp, a.scale);
    }
}

// The finished rows of a tile, divided by their weights.
inline void store_out(const Attention& a, const Item& item, const State& state) {
    int g = a.group();
    for (int64_t r = 0; r < item.rows(a); r++) {
        float inverse = 1.f / state.weights[r];
        int64_t place = ((item.token + r / g) * a.query_heads + item.kv_head * g + r % g) * a.d;
        for (int64_t i = 0; i < a.d; i += W) {
            vf x = load(state.sums + r * a.padded_d() + i) * inverse;
            if (a.query_bf16)
                store_at((bf16*)a.out + place, i, a.d, x);
            else
                store_at((float*)a.out + place, i, a.d, x);
        }
    }
}

}  // namespace

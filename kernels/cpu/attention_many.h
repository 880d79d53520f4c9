// Attention of a tile with many rows (prefill): arithmetic is what limits.
//
// The vector runs along the rows. The queries are turned once, a chunk's K and V are widened to float32 close by, and
// both products become outer products of a register tile.

#pragma once

#include "attention_tile.h"

namespace {

constexpr int TILE_ROWS = 96;        // of a tile, more only if G is larger
constexpr int MR = W == 16 ? 8 : 4;  // register tile: MR values times up to 3 vectors

// c[MR][V vectors] (+)= sum over k of a[i * ai + k * ak] * b[k * bk + vectors]
template <int V, bool ADD>
inline void outer_tile(float* c, int64_t ldc, const float* a, int64_t ai, int64_t ak, const float* b, int64_t bk,
                       int64_t k) {
    vf acc[MR][V];
    for (int i = 0; i < MR; i++)
        for (int v = 0; v < V; v++) acc[i][v] = ADD ? load(c + i * ldc + v * W) : vf{};
    for (int64_t n = 0; n < k; n++) {
        vf row[V];
        for (int v = 0; v < V; v++) row[v] = load(b + n * bk + v * W);
        for (int i = 0; i < MR; i++) {
            vf factor = splat(a[i * ai + n * ak]);
            for (int v = 0; v < V; v++) acc[i][v] = fused(factor, row[v], acc[i][v]);
        }
    }
    for (int i = 0; i < MR; i++)
        for (int v = 0; v < V; v++) store(c + i * ldc + v * W, acc[i][v]);
}

// m: a multiple of MR; columns: of W.
template <bool ADD>
inline void outer(float* c, int64_t ldc, const float* a, int64_t ai, int64_t ak, const float* b, int64_t bk, int64_t m,
                  int64_t columns, int64_t k) {
    int64_t vectors = columns / W;
    while (vectors > 0) {
        int64_t v = vectors % 3 == 0 ? 3 : vectors == 1 ? 1 : 2;  // 4 = 2 + 2, 5 = 2 + 3: a lone one is slow
        for (int64_t i = 0; i < m; i += MR) {
            if (v == 3)
                outer_tile<3, ADD>(c + i * ldc, ldc, a + i * ai, ai, ak, b, bk, k);
            else if (v == 2)
                outer_tile<2, ADD>(c + i * ldc, ldc, a + i * ai, ai, ak, b, bk, k);
            else
                outer_tile<1, ADD>(c + i * ldc, ldc, a + i * ai, ai, ak, b, bk, k);
        }
        b += v * W, c += v * W, vectors -= v;
    }
}

// Positions that W rows see, counted from the chunk's first.
struct Sight {
    vf low, high;
    bool some_hidden;  // of the chunk, from some of the rows
};

// The scores [CHUNK, rp] of W rows become weights, times V's scales. Returns the factor for earlier sums.
template <class T>
inline vf soften_column(float* scores, int64_t rp, const Chunk<T>& chunk, const Sight& sight, float cap, float* maxima,
                        float* weights) {
    int begin = chunk.low / W * W, end = (chunk.high + W - 1) / W * W;
    vf before = load(maxima), top = before;
    for (int n = begin; n < end; n++) {
        vf s = load(scores + n * rp);
        if constexpr (SCALED<T>) s *= chunk.k_scales[n];
        if (cap > 0) s = cap_scores(s, cap);
        if (sight.some_hidden) {
            vf at = splat((float)n);
            s = (at >= sight.low) & (at < sight.high) ? s : splat(-INF);
        }
        if (SCALED<T> || cap > 0 || sight.some_hidden) store(scores + n * rp, s);
        top = max(top, s);
    }
    vf shift = top == splat(-INF) ? vf{} : top, sums[W] = {};
    for (int first = begin; first < end; first += W)
#pragma GCC unroll 16
        for (int l = 0; l < W; l++) {
            int n = first + l;
            vf w = exp(load(scores + n * rp) - shift);
            sums[l] += w;
            if constexpr (SCALED<T>) w *= chunk.v_scales[n];
            store(scores + n * rp, w);
        }
    for (int n = W / 2; n > 0; n /= 2)
        for (int l = 0; l < n; l++) sums[l] += sums[l + n];
    vf factor = exp(before - shift);
    store(maxima, top);
    store(weights, fused(load(weights), factor, sums[0]));
    return factor;
}

// The chunk's K and V as float32 [CHUNK, padded_d]; K with zeros up to whole register tiles and vectors.
template <class T>
inline void widen_chunk(const Chunk<T>& chunk, int64_t d, int64_t dp, float* keys, float* values) {
    for (int n = chunk.low; n < chunk.high; n++)
        for (int64_t i = 0; i < dp; i += W) {
            store(keys + n * dp + i, load_at(chunk.k[n], i, d));
            store(values + n * dp + i, load_at(chunk.v[n], i, d));
        }
    int begin = chunk.low / 16 * 16, end = (chunk.high + 15) / 16 * 16;
    memset(keys + begin * dp, 0, (chunk.low - begin) * dp * sizeof(float));
    memset(keys + chunk.high * dp, 0, (end - chunk.high) * dp * sizeof(float));
}

// to [columns, rows] = from [rows, columns], both multiples of W.
inline void turn(const float* from, int64_t rows, int64_t columns, float* to) {
    for (int64_t r = 0; r < rows; r += W)
        for (int64_t c = 0; c < columns; c += W) {
            vf x[W];
            for (int i = 0; i < W; i++) x[i] = load(from + (r + i) * columns + c);
            transpose(x);
            for (int i = 0; i < W; i++) store(to + (c + i) * rows + r, x[i]);
        }
}

template <class T> void attend_many(const Attention& a, const Item& item, Scratch& scratch) {
    int64_t rows = item.rows(a), g = a.group(), d = a.d, dp = a.padded_d(), rp = item.padded_rows(a);
    float* qt = scratch.get<float>(rp * dp + CHUNK * (2 * dp + rp) + 2 * State::size(rp, dp) + 3 * rp);
    float* keys = qt + rp * dp;            // [CHUNK, dp]
    float* values = keys + CHUNK * dp;     // [CHUNK, dp]
    float* scores = values + CHUNK * dp;   // [CHUNK, rp]
    float* factors = scores + CHUNK * rp;  // [rp], as are those below
    float* lows = factors + rp;            // positions counted from the tile's first chunk: as floats exact below 2^24
    float* highs = lows + rp;
    float* memory = highs + rp;
    State whole(item.partial == nullptr ? memory : item.partial, rp, dp);
    State part(memory + State::size(rp, dp), rp, dp);

    load_query(a, item, part.sums);  // as a place to turn from
    memset(part.sums + rows * dp, 0, (rp - rows) * dp * sizeof(float));
    turn(part.sums, rp, dp, qt);
    int64_t all_low = item.low(a, item.tokens - 1), all_high = item.high(0);  // what every row sees
    int64_t origin = item.begin / CHUNK * CHUNK, position = origin;
    for (int64_t r = 0; r < rp; r++) {
        int64_t token = smaller(r / g, item.tokens - 1);
        lows[r] = (float)(item.low(a, token) - origin);
        highs[r] = (float)(item.high(token) - origin);
    }

    Chunk<T> chunk;
    for (int64_t begin = item.begin, end; begin < item.end; begin = end) {
        end = part_end(begin, item.end);
        const State& state = begin == item.begin ? whole : part;
        state.clear(rp, dp);
        for (; position < end; position += CHUNK) {
            chunk.locate(a, item, position, item.begin, item.end);
            int low = chunk.low / 16 * 16, high = (chunk.high + 15) / 16 * 16;
            widen_chunk(chunk, d, dp, keys, values);
            outer<false>(scores + low * rp, rp, keys + low * dp, dp, 1, qt, rp, high - low, rp, d);
            Sight sight;
            sight.some_hidden = position + low < all_low || position + high > all_high;
            bool rescale = false;
            for (int64_t r = 0; r < rp; r += W) {
                sight.low = load(lows + r) - (float)(position - origin);
                sight.high = load(highs + r) - (float)(position - origin);
                vf factor = soften_column(scores + r, rp, chunk, sight, a.cap, state.maxima + r, state.weights + r);
                store(factors + r, factor);
                rescale |= sum_lanes(factor) != (float)W;
            }
            if (rescale)
                for (int64_t r = 0; r < rp; r++)
                    for (int64_t i = 0; i < dp; i += W)
                        store(state.sums + r * dp + i, load(state.sums + r * dp + i) * factors[r]);
            outer<true>(state.sums, dp, scores + chunk.low * rp, 1, rp, values + chunk.low * dp, dp, rp, dp,
                        chunk.high - chunk.low);
        }
        if (&state != &whole) whole.join(part, rows, dp);
    }
    if (item.partial == nullptr) store_out(a, item, whole);
}

}  // namespace

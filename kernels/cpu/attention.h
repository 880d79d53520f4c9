// Paged causal attention. Contract: kernels/ops.py. Softmax is online and in float32 (Milakov and Gimelshein 2018; Dao
// et al. 2022); long ranges of KV are split among threads and merged when there is little else to share ("flash
// decoding").
//
// A tile is some consecutive tokens of one sequence times the G query heads that read one KV head: its rows, token by
// token, all use each K and V that is loaded. KV is visited in chunks, read from its blocks where it lies.
//   Few rows (decode):   a K row times a query row is a dot product with the vector along D, no K or V is copied.
//   Many rows (prefill): the vector runs along the rows. The queries are transposed once, a chunk's K and V are widened
//                        to float32 close by, and both products become outer products of a register tile.
// Rows of scores beyond what a query may see are dropped by position; slots nobody sees are never read.

#pragma once

#include <cmath>
#include <limits>

#include "simd.h"
#include "team.h"

namespace {

constexpr float INF = std::numeric_limits<float>::infinity();

constexpr int FEW_ROWS = 8;     // up to here a tile goes the decode way
constexpr int TILE_ROWS = 64;   // rows of a prefill tile, more only if G is larger
constexpr int ROW_STEP = 16;    // prefill rows are padded to a multiple of it
constexpr int CHUNK = 64;       // KV positions at a time
constexpr int MIN_PART = 256;   // a split of the KV range has at least so many positions
constexpr int64_t SMALL_ATTENTION = 1 << 19;  // multiply-adds, about 20 microseconds: below it the caller works alone

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

// One tile over one range of KV.
struct Item {
    int32_t sequence, kv_head;
    int64_t token;     // first of the tile, in the packed T
    int64_t tokens;
    int64_t position;  // of that token
    int64_t begin, end;
    int32_t parts;     // of the tile's range, counted in its first part; 0 in the others
    float* partial;    // the part's result: sums [rows, padded_d], maxima [rows], weights [rows]; null = to `out`

    int64_t rows(const Attention& a) const { return tokens * a.group(); }
    // Positions [low, high) that the tile's i-th token sees.
    int64_t high(int64_t i) const { return position + i + 1; }
    int64_t low(const Attention& a, int64_t i) const {
        return a.window > 0 && high(i) > a.window ? high(i) - a.window : 0;
    }
};

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Where a chunk's K and V rows are. An empty chunk follows the last one.
template <class T> struct Chunk {
    const T* k[CHUNK + W];
    const T* v[CHUNK + W];
    int count;

    Chunk(const Attention& a, const Item& item, int64_t first) {
        count = (int)smaller(CHUNK, larger(0, item.end - first));
        if (count == 0) return;
        const int32_t* table = a.tables + item.sequence * a.table_stride;
        int64_t head = item.kv_head * a.block_size * a.d;
        int64_t column = first / a.block_size, offset = first % a.block_size;
        for (int n = 0; n < count; column++, offset = 0) {
            const T* keys = (const T*)a.keys + table[column] * a.keys_stride + head;
            const T* values = (const T*)a.values + table[column] * a.values_stride + head;
            for (; offset < a.block_size && n < count; offset++, n++) {
                k[n] = keys + offset * a.d;
                v[n] = values + offset * a.d;
            }
        }
        for (int n = count; n < (count + W - 1) / W * W; n++) k[n] = k[count - 1];  // legal to read, dropped later
    }
};

// A block is a page or less, so the CPU's own prefetcher does not see the next one coming.
template <class T> inline void prefetch_row(const T* row, int64_t d) {
    for (int64_t i = 0; i < d; i += 64 / sizeof(T)) __builtin_prefetch(row + i, 0, 3);
}

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

inline void store_out_row(const Attention& a, int64_t token, int64_t head, const float* sums, float weight) {
    float inverse = 1.f / weight;
    int64_t place = (token * a.query_heads + head) * a.d;
    for (int64_t i = 0; i < a.d; i += W) {
        if (a.query_bf16)
            store_at((bf16*)a.out + place, i, a.d, load(sums + i) * inverse);
        else
            store_at((float*)a.out + place, i, a.d, load(sums + i) * inverse);
    }
}

// The tile's sums [rows, padded_d], maxima and weights [rows]: to `out`, or aside to be merged.
inline void finish(const Attention& a, const Item& item, const float* sums, const float* maxima, const float* weights) {
    int64_t rows = item.rows(a), dp = a.padded_d();
    int g = a.group();
    if (item.partial == nullptr) {
        for (int64_t r = 0; r < rows; r++)
            store_out_row(a, item.token + r / g, item.kv_head * g + r % g, sums + r * dp, weights[r]);
        return;
    }
    memcpy(item.partial, sums, rows * dp * sizeof(float));
    memcpy(item.partial + rows * dp, maxima, rows * sizeof(float));
    memcpy(item.partial + rows * (dp + 1), weights, rows * sizeof(float));
}

// Merge the parts of one tile and write it. The parts' results lie one after the other from first.partial.
inline void merge(const Attention& a, const Item& first) {
    int parts = first.parts;
    int64_t rows = first.rows(a), dp = a.padded_d(), size = rows * (dp + 2);
    int g = a.group();
    for (int64_t r = 0; r < rows; r++) {
        float* total = first.partial + r * dp;
        float maximum = -INF, weight = 0;
        for (int p = 0; p < parts; p++) maximum = std::fmax(maximum, first.partial[p * size + rows * dp + r]);
        for (int p = 0; p < parts; p++) {
            float* part = first.partial + p * size;
            float factor = std::exp(part[rows * dp + r] - maximum);
            weight += factor * part[rows * (dp + 1) + r];
            for (int64_t i = 0; i < dp; i += W) {
                vf scaled = factor * load(part + r * dp + i);
                store(total + i, p == 0 ? scaled : load(total + i) + scaled);
            }
        }
        store_out_row(a, first.token + r / g, first.kv_head * g + r % g, total, weight);
    }
}

// ---------------------------------------------------------------- few rows

// Scores of R queries against C keys. Register tile of R * C <= W sums.
template <int R, int C, class T>
inline void dot_tile(const float* q, int64_t dp, const T* const* k, int64_t d, float* scores) {
    vf sums[W] = {};
    for (int64_t i = 0; i < d; i += W) {
        vf key[C];
        for (int c = 0; c < C; c++) key[c] = load_at(k[c], i, d);
        for (int r = 0; r < R; r++) {
            vf query = load(q + r * dp + i);
            for (int c = 0; c < C; c++) sums[r * C + c] += query * key[c];
        }
    }
    float each[W];
    store(each, sum_each(sums));
    for (int r = 0; r < R; r++) memcpy(scores + r * CHUNK, each + r * C, C * sizeof(float));
}

template <int R, class T>
inline void dot_rows(const float* q, int64_t dp, const Chunk<T>& chunk, const Chunk<T>* next, int64_t d,
                     float* scores) {
    constexpr int C = R == 1 ? W : R == 2 ? W / 2 : W / 4;
    for (int n = 0; n < chunk.count; n += C) {
        if (next != nullptr)
            for (int c = n; c < n + C && c < next->count; c++) prefetch_row(next->k[c], d);
        dot_tile<R, C>(q, dp, chunk.k + n, d, scores + n);
    }
}

// sums[r] = factors[r] * sums[r] + weights[r] · V, for V vectors of columns from column i on.
template <int R, int V, class T>
inline void weigh_tile(const float* weights, const Chunk<T>& chunk, const Chunk<T>* next, int64_t i, int64_t d,
                       const float* factors, float* sums, int64_t dp) {
    vf acc[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) acc[r][v] = factors[r] * load(sums + r * dp + i + v * W);
    for (int n = 0; n < chunk.count; n++) {
        if (next != nullptr && n < next->count) prefetch_row(next->v[n], d);
        vf value[V];
        if (V > 1)
            for (int v = 0; v < V; v++) value[v] = load(chunk.v[n] + i + v * W);
        else
            value[0] = load_at(chunk.v[n], i, d);
        for (int r = 0; r < R; r++) {
            vf weight = splat(weights[r * CHUNK + n]);
            for (int v = 0; v < V; v++) acc[r][v] += weight * value[v];
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) store(sums + r * dp + i + v * W, acc[r][v]);
}

template <int R, class T>
inline void weigh_rows(const float* weights, const Chunk<T>& chunk, const Chunk<T>* next, int64_t d,
                       const float* factors, float* sums, int64_t dp) {
    constexpr int V = W == 16 ? 4 : 2;  // 16 registers hold 4 rows times 2
    int64_t i = 0;
    for (; i + V * W <= d; i += V * W)
        weigh_tile<R, V>(weights, chunk, i == 0 ? next : nullptr, i, d, factors, sums, dp);
    for (; i < d; i += W) weigh_tile<R, 1>(weights, chunk, i == 0 ? next : nullptr, i, d, factors, sums, dp);
}

// A row's scores in [low, high) of the chunk become weights, the others 0. Returns the factor for earlier sums.
inline float soften(float* scores, int count, int low, int high, float cap, float& maximum, float& weight) {
    vf top = splat(-INF);
    int whole = (count + W - 1) / W * W;
    vi lane{};
    for (int i = 0; i < W; i++) lane[i] = i;
    for (int n = 0; n < whole; n += W) {
        vf s = load(scores + n);
        if (cap > 0) s = cap_scores(s, cap);
        if (n < low || n + W > high) s = (lane + n >= low) & (lane + n < high) ? s : splat(-INF);
        store(scores + n, s);
        top = max(top, s);
    }
    float before = maximum;
    maximum = std::fmax(before, max_lanes(top));
    if (maximum == -INF) maximum = before;
    float shift = maximum == -INF ? 0.f : maximum;
    vf sum{};
    for (int n = 0; n < whole; n += W) {
        vf w = exp(load(scores + n) - shift);
        store(scores + n, w);
        sum += w;
    }
    float factor = before == -INF ? 0.f : std::exp(before - shift);
    weight = weight * factor + sum_lanes(sum);
    return factor;
}

template <class T> void attend_few(const Attention& a, const Item& item, Scratch& scratch) {
    int rows = (int)item.rows(a), g = a.group();
    int64_t dp = a.padded_d();
    float* q = scratch.get<float>(2 * rows * dp);
    float* sums = q + rows * dp;
    float scores[FEW_ROWS * CHUNK + W];
    float maxima[FEW_ROWS], weights[FEW_ROWS], factors[FEW_ROWS];
    load_query(a, item, q);
    memset(sums, 0, rows * dp * sizeof(float));
    for (int r = 0; r < rows; r++) maxima[r] = -INF, weights[r] = 0;
    Chunk<T> both[2] = {{a, item, item.begin}, {a, item, item.begin + CHUNK}};
    for (int64_t first = item.begin; first < item.end; first += CHUNK) {
        const Chunk<T>& chunk = both[(first - item.begin) / CHUNK % 2];
        const Chunk<T>& next = both[(first - item.begin) / CHUNK % 2 ^ 1];
        for (int r = 0; r < rows; r += 4) {
            const Chunk<T>* ahead = r == 0 ? &next : nullptr;
            const float* from = q + r * dp;
            float* to = scores + r * CHUNK;
            switch (rows - r) {
                case 1: dot_rows<1>(from, dp, chunk, ahead, a.d, to); break;
                case 2: dot_rows<2>(from, dp, chunk, ahead, a.d, to); break;
                case 3: dot_rows<3>(from, dp, chunk, ahead, a.d, to); break;
                default: dot_rows<4>(from, dp, chunk, ahead, a.d, to);
            }
        }
        for (int r = 0; r < rows; r++) {
            int low = (int)larger(0, item.low(a, r / g) - first);
            int high = (int)smaller(chunk.count, item.high(r / g) - first);
            factors[r] = soften(scores + r * CHUNK, chunk.count, low, high, a.cap, maxima[r], weights[r]);
        }
        for (int r = 0; r < rows; r += 4) {
            const Chunk<T>* ahead = r == 0 ? &next : nullptr;
            const float* from = scores + r * CHUNK;
            float* to = sums + r * dp;
            switch (rows - r) {
                case 1: weigh_rows<1>(from, chunk, ahead, a.d, factors + r, to, dp); break;
                case 2: weigh_rows<2>(from, chunk, ahead, a.d, factors + r, to, dp); break;
                case 3: weigh_rows<3>(from, chunk, ahead, a.d, factors + r, to, dp); break;
                default: weigh_rows<4>(from, chunk, ahead, a.d, factors + r, to, dp);
            }
        }
        both[(first - item.begin) / CHUNK % 2] = Chunk<T>(a, item, first + 2 * CHUNK);
    }
    finish(a, item, sums, maxima, weights);
}

// ---------------------------------------------------------------- many rows

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
            for (int v = 0; v < V; v++) acc[i][v] += factor * row[v];
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

template <class T> void attend_many(const Attention& a, const Item& item, Scratch& scratch) {
    int64_t rows = item.rows(a), g = a.group(), d = a.d, dp = a.padded_d();
    int64_t rp = (rows + ROW_STEP - 1) / ROW_STEP * ROW_STEP;
    float* qt = scratch.get<float>(rp * d + CHUNK * (2 * dp + rp) + rp * (dp + 2) + (3 + 2) * rp);
    float* keys = qt + rp * d;             // [CHUNK, dp]
    float* values = keys + CHUNK * dp;     // [CHUNK, dp]
    float* scores = values + CHUNK * dp;   // [CHUNK, rp]
    float* sums = scores + CHUNK * rp;     // [rp, dp]
    float* maxima = sums + rp * dp;        // [rp], as are those below
    float* weights = maxima + rp;
    float* factors = weights + rp;
    float* lows = factors + rp;            // positions as floats: exact below 2^24 relative to the tile's first chunk
    float* highs = lows + rp;

    load_query(a, item, sums);  // sums as a place to transpose from
    memset(sums + rows * dp, 0, (rp - rows) * dp * sizeof(float));
    for (int64_t r = 0; r < rp; r++)
        for (int64_t i = 0; i < d; i++) qt[i * rp + r] = sums[r * dp + i];
    memset(sums, 0, rp * dp * sizeof(float));
    int64_t all_low = item.low(a, item.tokens - 1), all_high = item.high(0);  // what every row sees
    for (int64_t r = 0; r < rp; r++) {
        int64_t token = smaller(r / g, item.tokens - 1);
        lows[r] = (float)(item.low(a, token) - item.begin);
        highs[r] = (float)(item.high(token) - item.begin);
        maxima[r] = -INF, weights[r] = 0;
    }

    for (int64_t first = item.begin; first < item.end; first += CHUNK) {
        Chunk<T> chunk(a, item, first);
        int count = chunk.count, padded = (count + MR - 1) / MR * MR;
        for (int n = 0; n < count; n++)
            for (int64_t i = 0; i < dp; i += W) {
                store(keys + n * dp + i, load_at(chunk.k[n], i, d));
                store(values + n * dp + i, load_at(chunk.v[n], i, d));
            }
        memset(keys + count * dp, 0, (padded - count) * dp * sizeof(float));
        outer<false>(scores, rp, keys, dp, 1, qt, rp, padded, rp, d);

        bool some_hidden = first < all_low || first + count > all_high, rescale = false;
        for (int64_t r = 0; r < rp; r += W) {
            vf before = load(maxima + r), top = before, low = load(lows + r), high = load(highs + r);
            for (int n = 0; n < count; n++) {
                vf s = load(scores + n * rp + r);
                if (a.cap > 0) s = cap_scores(s, a.cap);
                if (some_hidden) {
                    vf at = splat((float)(first - item.begin + n));
                    s = (at >= low) & (at < high) ? s : splat(-INF);
                }
                if (a.cap > 0 || some_hidden) store(scores + n * rp + r, s);
                top = max(top, s);
            }
            vf shift = top == splat(-INF) ? vf{} : top, sum{};
            for (int n = 0; n < count; n++) {
                vf w = exp(load(scores + n * rp + r) - shift);
                store(scores + n * rp + r, w);
                sum += w;
            }
            vf factor = exp(before - shift);
            store(maxima + r, top);
            store(factors + r, factor);
            store(weights + r, load(weights + r) * factor + sum);
            rescale |= sum_lanes(factor) != (float)W;
        }
        if (rescale)
            for (int64_t r = 0; r < rp; r++)
                for (int64_t i = 0; i < dp; i += W) store(sums + r * dp + i, load(sums + r * dp + i) * factors[r]);
        outer<true>(sums, dp, scores, 1, rp, values, dp, rp, dp, count);
    }
    finish(a, item, sums, maxima, weights);
}

// ---------------------------------------------------------------- the whole call

template <class T> inline void attend(const Attention& a, const Item& item) {
    static thread_local Scratch scratch;
    if (item.rows(a) <= FEW_ROWS)
        attend_few<T>(a, item, scratch);
    else
        attend_many<T>(a, item, scratch);
}

// Calls visit(item) for every tile, the longest ranges of a sequence first.
template <class F> void each_tile(const Attention& a, F&& visit) {
    int64_t most = larger(1, TILE_ROWS / a.group());
    for (int64_t s = 0; s < a.sequences; s++) {
        int64_t start = a.query_start[s], tokens = a.query_start[s + 1] - start;
        int64_t offset = a.context_lens[s] - tokens;
        for (int64_t tile = (tokens + most - 1) / most - 1; tile >= 0; tile--)
            for (int64_t h = 0; h < a.kv_heads; h++) {
                int64_t first = tile * most;
                Item item{(int32_t)s,     (int32_t)h, start + first, smaller(most, tokens - first),
                          offset + first, 0,          0,             1,
                          nullptr};
                item.begin = item.low(a, 0);
                item.end = item.high(item.tokens - 1);
                visit(item);
            }
    }
}

template <class T> void paged_attention(const Attention& a) {
    int64_t tiles = 0, positions = 0, work = 0;
    each_tile(a, [&](const Item& item) {
        tiles++;
        positions += item.end - item.begin;
        work += (item.end - item.begin) * (item.rows(a) + 4) * a.d;  // 4: loading a position costs about as much
    });
    int threads = work < SMALL_ATTENTION ? 1 : a.threads;

    // Parts are a function of shapes and thread count alone, so a result never depends on timing.
    int64_t most = std::numeric_limits<int64_t>::max();
    if (threads > 1 && tiles < 4 * threads) most = larger(MIN_PART, positions / (4 * threads));
    auto parts_of = [&](const Item& item) { return larger(1, (item.end - item.begin) / most); };

    int64_t count = 0, partial_floats = 0;
    each_tile(a, [&](const Item& item) {
        int64_t parts = parts_of(item);
        count += parts;
        if (parts > 1) partial_floats += parts * item.rows(a) * (a.padded_d() + 2);
    });
    static thread_local Scratch plan, partials;
    Item* items = plan.get<Item>(count);
    float* partial = partial_floats > 0 ? partials.get<float>(partial_floats) : nullptr;
    int64_t n = 0;
    each_tile(a, [&](const Item& tile) {
        int64_t parts = parts_of(tile), length = tile.end - tile.begin;
        for (int64_t p = 0; p < parts; p++) {
            Item item = tile;
            item.begin = tile.begin + length * p / parts;
            item.end = tile.begin + length * (p + 1) / parts;
            item.parts = p == 0 ? (int32_t)parts : 0;
            if (parts > 1) {
                item.partial = partial;
                partial += item.rows(a) * (a.padded_d() + 2);
            }
            items[n++] = item;
        }
    });
    share(count, threads, [&](int64_t i) { attend<T>(a, items[i]); });
    for (int64_t i = 0; i < count; i++)
        if (items[i].parts > 1) merge(a, items[i]);
}

}  // namespace

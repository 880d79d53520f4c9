// Attention of a tile with few rows (decode, a short verify): K and V pass once, and memory is what limits.
//
// Scores: W keys at a time are turned in registers, so that a vector holds one component of W keys and the sums of each
// query run along the keys. A cache of narrow values is turned as words of 32 bits, that hold 2 or 4 components.
// weight · V: the vector runs along the components. The chunk after the one at hand is fetched meanwhile: a block is a
// page or less, and the CPU's own prefetcher does not see the next one coming.

#pragma once

#include "attention_tile.h"

namespace {

constexpr int ROWS_AT_ONCE = W == 16 ? 8 : 4;  // 32 registers hold 8 sums beside W turned words, 16 registers 4

// Calls f with `rows` in its type, 1 … ROWS_AT_ONCE.
template <class F> inline void with_rows(int rows, F&& f) {
    switch (rows) {
        case 1: return f(std::integral_constant<int, 1>{});
        case 2: return f(std::integral_constant<int, 2>{});
        case 3: return f(std::integral_constant<int, 3>{});
        case 4: return f(std::integral_constant<int, 4>{});
#if defined(__AVX512F__)
        case 5: return f(std::integral_constant<int, 5>{});
        case 6: return f(std::integral_constant<int, 6>{});
        case 7: return f(std::integral_constant<int, 7>{});
        case 8: return f(std::integral_constant<int, 8>{});
#endif
    }
}

// Components in a word, and the i-th of them from a vector of words.
template <class T> constexpr int IN_WORD = 4 / sizeof(T);
template <class T> inline vf component(vf words, int i) {
    if constexpr (sizeof(T) == 4)
        return words;
    else if constexpr (sizeof(T) == 2)
        return i == 0 ? (vf)((vi)words << 16) : (vf)((vi)words & (int)0xffff0000);
    else
        return __builtin_convertvector((vi)words << (24 - 8 * i) >> 24, vf);
}

template <class T> inline vf load_words(const T* p) {
    vf x;
    memcpy(&x, p, sizeof x);
    return x;
}
// The first n < W * IN_WORD components, then zeros.
template <class T> inline vf load_words(const T* p, int n) {
#if defined(__AVX512F__)
    __mmask64 bytes = ((__mmask64)1 << (n * sizeof(T))) - 1;
    return (vf)_mm512_maskz_loadu_epi8(bytes, p);
#else
    T lanes[W * IN_WORD<T>] = {};
    memcpy(lanes, p, n * sizeof(T));
    return load_words(lanes);
#endif
}

// sums[r] over W keys of the components from i on: WHOLE vectors of words, or the last n components.
template <int R, bool WHOLE, class T>
inline void add_products(const float* q, const T* const* k, const T* const* ahead, int64_t i, int n, vf (&sums)[R]) {
    vf x[W];
    for (int c = 0; c < W; c++) {
        x[c] = WHOLE ? load_words(k[c] + i) : load_words(k[c] + i, n);
        __builtin_prefetch(ahead[c] + i, 0, 2);
    }
    transpose(x);
    int words = WHOLE ? W : (n + IN_WORD<T> - 1) / IN_WORD<T>;
#pragma GCC unroll 16
    for (int j = 0; j < words; j++)
        for (int e = 0; e < IN_WORD<T>; e++) {
            vf key = component<T>(x[j], e);
            for (int r = 0; r < R; r++) sums[r] = fused(splat(q[(j * IN_WORD<T> + e) * R + r]), key, sums[r]);
        }
}

// scores [R, CHUNK] of W keys. q: [padded to whole vectors of words, R].
template <int R, class T>
inline void score(const float* q, const T* const* k, const T* const* ahead, int64_t d, float* scores) {
    constexpr int STEP = W * IN_WORD<T>;
    vf sums[R] = {};
    int64_t i = 0;
    for (; i + STEP <= d; i += STEP) add_products<R, true>(q + i * R, k, ahead, i, STEP, sums);
    if (i < d) add_products<R, false>(q + i * R, k, ahead, i, (int)(d - i), sums);
    for (int r = 0; r < R; r++) store(scores + r * CHUNK, sums[r]);
}

// A row's scores of a chunk become weights, times V's scales; those out of [low, high) become 0. Returns the factor for
// earlier sums.
template <class T>
inline vf soften(float* scores, const Chunk<T>& chunk, int low, int high, float cap, float& maximum, float& weight) {
    int begin = chunk.low / W * W;
    vf top = splat(maximum);
    vi lane{};
    for (int i = 0; i < W; i++) lane[i] = i;
    for (int n = begin; n < chunk.high; n += W) {
        vf s = load(scores + n);
        if constexpr (SCALED<T>) s *= load(chunk.k_scales + n);
        if (cap > 0) s = cap_scores(s, cap);
        if (n < low || n + W > high) s = (lane + n >= low) & (lane + n < high) ? s : splat(-INF);
        store(scores + n, s);
        top = max(top, s);
    }
    float before = maximum;
    maximum = max_lanes(top);
    vf shift = splat(maximum == -INF ? 0.f : maximum), sum{};
    for (int n = begin; n < chunk.high; n += W) {
        vf w = exp(load(scores + n) - shift);
        sum += w;
        if constexpr (SCALED<T>) w *= load(chunk.v_scales + n);
        store(scores + n, w);
    }
    vf factor = exp(splat(before) - shift);
    weight = fused(splat(weight), factor, splat(sum_lanes(sum)))[0];
    return factor;
}

// sums[r] = factors[r] * sums[r] + weights[r] · V, for V vectors of components from i on.
template <int R, int V, class T>
inline void weigh(const float* weights, const Chunk<T>& chunk, const Chunk<T>& ahead, bool fetch, int64_t i, int64_t d,
                  const vf* factors, float* sums, int64_t dp) {
    vf acc[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) acc[r][v] = factors[r] * load(sums + r * dp + i + v * W);
    for (int n = chunk.low; n < chunk.high; n++) {
        if (fetch)
            for (int64_t j = 0; j < d; j += 64 / (int64_t)sizeof(T)) __builtin_prefetch(ahead.v[n] + j, 0, 2);
        vf value[V];
        if (V > 1)
            for (int v = 0; v < V; v++) value[v] = load(chunk.v[n] + i + v * W);
        else
            value[0] = load_at(chunk.v[n], i, d);
        for (int r = 0; r < R; r++) {
            vf weight = splat(weights[r * CHUNK + n]);
            for (int v = 0; v < V; v++) acc[r][v] = fused(weight, value[v], acc[r][v]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) store(sums + r * dp + i + v * W, acc[r][v]);
}

// One chunk for R rows, from row `first` on.
template <int R, class T>
inline void attend_chunk(const Attention& a, const Item& item, const float* q, int first, const Chunk<T>& chunk,
                         const Chunk<T>& ahead, int64_t position, const State& state) {
    constexpr int V = R <= ROWS_AT_ONCE / 2 ? (W == 16 ? 4 : 2) : (W == 16 ? 2 : 1);  // sums that registers hold
    float scores[R * CHUNK];
    vf factors[R];
    int64_t dp = a.padded_d();
    for (int n = chunk.low / W * W; n < chunk.high; n += W)
        score<R>(q, chunk.k + n, ahead.k + n, a.d, scores + n);
    for (int r = 0; r < R; r++) {
        int64_t token = (first + r) / a.group();
        int low = (int)larger(chunk.low, item.low(a, token) - position);
        int high = (int)smaller(chunk.high, item.high(token) - position);
        float &maximum = state.maxima[first + r], &weight = state.weights[first + r];
        factors[r] = soften(scores + r * CHUNK, chunk, low, high, a.cap, maximum, weight);
    }
    float* sums = state.sums + first * dp;
    int64_t i = 0;
    for (; i + V * W <= a.d; i += V * W)
        weigh<R, V>(scores, chunk, ahead, i == 0, i, a.d, factors, sums, dp);
    for (; i < a.d; i += W) weigh<R, 1>(scores, chunk, ahead, i == 0, i, a.d, factors, sums, dp);
}

// next: the item that this thread will likely have next, or null.
template <class T> void attend_few(const Attention& a, const Item& item, const Item* next, Scratch& scratch) {
    constexpr int STEP = W * IN_WORD<T>;
    int rows = (int)item.rows(a);
    int64_t dp = a.padded_d(), depth = (a.d + STEP - 1) / STEP * STEP;
    float* q = scratch.get<float>(rows * (depth + dp) + 2 * State::size(rows, dp));
    float* by_row = q + rows * depth;
    State whole(item.partial == nullptr ? by_row + rows * dp : item.partial, rows, dp);
    State part(by_row + rows * dp + State::size(rows, dp), rows, dp);
    load_query(a, item, by_row);
    memset(q, 0, rows * depth * sizeof(float));
    for (int first = 0; first < rows; first += ROWS_AT_ONCE) {
        int n = (int)smaller(ROWS_AT_ONCE, rows - first);
        for (int64_t i = 0; i < a.d; i++)
            for (int r = 0; r < n; r++) q[first * depth + i * n + r] = by_row[(first + r) * dp + i];
    }
    Chunk<T> both[2];
    int now = 0;
    int64_t position = item.begin / CHUNK * CHUNK;
    both[now].locate(a, item, position, item.begin, item.end);
    for (int64_t begin = item.begin, end; begin < item.end; begin = end) {
        end = part_end(begin, item.end);
        const State& state = begin == item.begin ? whole : part;
        state.clear(rows, dp);
        for (; position < end; position += CHUNK, now ^= 1) {
            bool more = both[now ^ 1].locate(a, item, position + CHUNK, item.begin, item.end);
            if (!more && next != nullptr)
                more = both[now ^ 1].locate(a, *next, next->begin / CHUNK * CHUNK, next->begin, next->end);
            const Chunk<T>& ahead = both[more ? now ^ 1 : now];
            for (int first = 0; first < rows; first += ROWS_AT_ONCE)
                with_rows((int)smaller(ROWS_AT_ONCE, rows - first), [&](auto r) {
                    attend_chunk<r.value>(a, item, q + first * depth, first, both[now], ahead, position, state);
                });
        }
        if (&state != &whole) whole.join(part, rows, dp);
    }
    if (item.partial == nullptr) store_out(a, item, whole);
}

}  // namespace

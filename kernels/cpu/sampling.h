// Sampling over the vocabulary: largest logits, draws, log probabilities. Contracts: kernels/ops.py; logits are float32.
//
// A row's result depends on the row alone, bit for bit: threads share rows, or the blocks of one row, never the terms of
// a sum. Terms are summed within a block of tokens in float32, over blocks, in token order, in float64.
//
// Instead of sorting a row, its kept tokens are bounded first, by the blocks' maxima and by what top_p can leave out at
// most, so that one more reading of a few blocks has all that the exact edge depends on.

#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "simd.h"
#include "team.h"

namespace {

constexpr int64_t BLOCK = 64;  // as in kernels/sampling.py
constexpr int64_t VECTORS = BLOCK / W;
constexpr float INFINITE = __builtin_inff();

inline bool any(vi mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
    return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
    int32_t found = 0;
    for (int i = 0; i < W; i++) found |= mask[i];
    return found != 0;
#endif
}

// Writes the lanes of x that are in the mask, and what it likes up to out + W; returns how many.
inline int64_t append(float* out, vf x, vi mask) {
#if defined(__AVX512F__)
    __mmask16 lanes = _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
    _mm512_storeu_ps(out, _mm512_maskz_compress_ps(lanes, (__m512)x));
    return __builtin_popcount(lanes);
#else
    int64_t n = 0;
    for (int i = 0; i < W; i++) {
        out[n] = x[i];
        n -= mask[i];
    }
    return n;
#endif
}

inline vf lane() {
    vf x;
    for (int i = 0; i < W; i++) x[i] = (float)i;
    return x;
}

// Lane i of the result is the largest lane of x[i] (see sum_each).
inline vf max_each(vf (&x)[W]) {
    for (int n = W / 2; n > 0; n /= 2)
        for (int i = 0; i < n; i++) x[i] = max(zip_low(x[i], x[i + n]), zip_high(x[i], x[i + n]));
    return x[0];
}

// The largest f(x) of n numbers; NaN if one is.
template <class F> float largest(const float* x, int64_t n, F f) {
    vf most = splat(-INFINITE);
    vi nan{};
    for (int64_t i = 0; i < n; i += W) {
        vf v = f(load_at(x, i, n));
        if (i + W > n) v = lane() < splat((float)(n - i)) ? v : splat(-INFINITE);
        nan |= v != v;
        most = max(v, most);
    }
    return any(nan) ? NAN : max_lanes(most);
}
inline float largest(const float* x, int64_t n) {
    return largest(x, n, [](vf v) { return v; });
}
inline float least(const float* x, int64_t n) {
    return -largest(x, n, [](vf v) { return -v; });
}

// The place of the first of the numbers that equals `wanted`, which is there.
inline int64_t first_equal(const float* x, float wanted) {
    int64_t i = 0;
    while (x[i] != wanted) i++;
    return i;
}

// One row of logits in blocks; the last block is padded with -inf.
class Row {
  public:
    Row(const float* logits, int64_t vocab) : blocks((vocab + BLOCK - 1) / BLOCK), logits_(logits) {
        int64_t rest = vocab % BLOCK;
        partial_ = rest ? blocks - 1 : -1;
        for (int64_t i = 0; rest && i < BLOCK; i++) padded_[i] = i < rest ? logits[partial_ * BLOCK + i] : -INFINITE;
    }
    const float* block(int64_t b) const { return b == partial_ ? padded_ : logits_ + b * BLOCK; }

    const int64_t blocks;

  private:
    const float* logits_;
    int64_t partial_;
    float padded_[BLOCK];
};

// maxima[b] = the largest logit of block b, NaN if it holds one.
inline void block_peaks(const Row& row, int64_t first, int64_t last, float* maxima) {
    int64_t b = first;
    for (; b + W <= last; b += W) {
        vf most[W];
        vu loudest{};  // magnitudes without sign: NaN is above infinity
        for (int64_t j = 0; j < W; j++) {
            const float* x = row.block(b + j);
            most[j] = load(x);
            for (int64_t i = 0; i < VECTORS; i++) {
                vf v = load(x + i * W);
                vu magnitude = (vu)v << 1;
                loudest = magnitude > loudest ? magnitude : loudest;
                most[j] = max(v, most[j]);
            }
        }
        store(maxima + b, max_each(most));
        if (any(loudest > 0xff000000u))
            for (int64_t j = 0; j < W; j++) maxima[b + j] = largest(row.block(b + j), BLOCK);
    }
    for (; b < last; b++) maxima[b] = largest(row.block(b), BLOCK);
}

// The gap of a token is the row's largest logit minus its own. Its weight is exp(-gap / temperature), in (0, 1], and 0
// for gaps beyond `limit`.
struct Weights {
    float top, scale, limit;

    vf gaps(const float* x) const { return top - load(x); }
    vf of_gaps(vf gap) const { return exp(gap * -scale); }
    vf of(const float* x) const {
        vf gap = gaps(x);
        return gap <= splat(limit) ? of_gaps(gap) : vf{};
    }
};

// out[i] = the sum of the weights of block which(i). A sum's bits do not depend on the blocks it is made with.
template <class Which>
void block_sums(const Row& row, Weights weights, int64_t first, int64_t last, Which which, float* out) {
    for (int64_t i = first; i < last; i += W) {
        vf sums[W] = {};
        int n = (int)std::min<int64_t>(W, last - i);
        for (int j = 0; j < n; j++) {
            const float* x = row.block(which(i + j));
            for (int64_t v = 0; v < VECTORS; v++) sums[j] += weights.of(x + v * W);
        }
        store(out + i, sum_each(sums), n);
    }
}

// The gaps up to `bound`, in token order; out has room for all, and W more. Infinite gaps never count: they weigh 0.
inline int64_t collect(const Row& row, const float* maxima, float top, float bound, float* out) {
    bound = std::min(bound, FLT_MAX);
    int64_t n = 0;
    for (int64_t b = 0; b < row.blocks; b++) {
        if (!(top - maxima[b] <= bound)) continue;
        for (int64_t v = 0; v < VECTORS; v++) {
            vf gap = top - load(row.block(b) + v * W);
            n += append(out + n, gap, gap <= splat(bound));
        }
    }
    return n;
}

// The gap at which, in ascending order, the sum of their terms reaches `wanted`; INFINITE if it never does. gaps: finite, n
// of them and room for W more, overwritten. Buckets narrow them down to the few that are worth sorting. The terms of a bucket are summed in
// the order given, which is why every caller keeps to token order.
template <class Term> float crossing(float* gaps, int64_t n, double wanted, Term term) {
    constexpr int BUCKETS = 256;
    constexpr int64_t FEW = 64;
    double below = 0;
    for (bool whole = true; n > 0; whole = false) {
        float low = least(gaps, n), high = largest(gaps, n);
        float finer = BUCKETS / (high - low);
        if (n <= FEW || !(finer <= FLT_MAX)) {
            if (high > low) std::sort(gaps, gaps + n);
            for (int64_t i = 0; i < n; i++) {
                below += (double)term(splat(gaps[i]))[0];
                if (below >= wanted) return gaps[i];
            }
            return whole ? INFINITE : high;  // a bucket had reached it, but for rounding
        }
        auto bucket_of = [&](vf gap) {
            vf place = (gap - low) * finer;
            return __builtin_convertvector(place < splat(BUCKETS - 1) ? place : splat(BUCKETS - 1), vi);
        };
        double sums[BUCKETS] = {};
        for (int64_t i = 0; i < n; i += W) {
            vf gap = load_at(gaps, i, n), terms = term(gap);
            vi bucket = bucket_of(gap);
            for (int j = 0; j < W && i + j < n; j++) sums[bucket[j]] += (double)terms[j];
        }
        int crossed = 0;
        while (crossed < BUCKETS && below + sums[crossed] < wanted) below += sums[crossed++];
        if (crossed == BUCKETS) return whole ? INFINITE : high;
        int64_t kept = 0;
        for (int64_t i = 0; i < n; i += W) {
            vf gap = load_at(gaps, i, n);
            vi wanted_lanes = (bucket_of(gap) == crossed) & (lane() < splat((float)(n - i)));
            kept += append(gaps + kept, gap, wanted_lanes);
        }
        n = kept;
    }
    return INFINITE;
}

// The k-th smallest gap; INFINITE if there are fewer.
inline float kth(float* gaps, int64_t n, int64_t k) {
    return crossing(gaps, n, (double)k, [](vf) { return splat(1); });
}

// A gap within which the k smallest are, as far as the maxima tell: k blocks hold at least k tokens. Overwrites spare.
inline float kth_bound(const float* maxima, int64_t blocks, float top, int64_t k, float* spare) {
    if (k > blocks) return INFINITE;
    for (int64_t b = 0; b < blocks; b++) spare[b] = std::min(top - maxima[b], FLT_MAX);
    return kth(spare, blocks, k);
}

struct FindPeaks {
    const float* logits;
    float *maxima, *top;
    int64_t* token_ids;
    int64_t rows, vocab, threads;
};

inline void find_peaks(const FindPeaks& a) {
    int64_t blocks = (a.vocab + BLOCK - 1) / BLOCK;
    share_rows(a.rows * blocks, BLOCK, (int)a.threads, [&](int64_t first, int64_t last) {
        for (int64_t r = first / blocks; r * blocks < last; r++) {
            Row row(a.logits + r * a.vocab, a.vocab);
            int64_t begin = std::max(first - r * blocks, (int64_t)0), end = std::min(last - r * blocks, blocks);
            block_peaks(row, begin, end, a.maxima + r * blocks);
        }
    });
    for (int64_t r = 0; r < a.rows; r++) {
        const float* maxima = a.maxima + r * blocks;
        float top = a.top[r] = largest(maxima, blocks);
        a.token_ids[r] = 0;
        if (!std::isfinite(top)) continue;
        int64_t b = first_equal(maxima, top);
        a.token_ids[r] = b * BLOCK + first_equal(a.logits + r * a.vocab + b * BLOCK, top);
    }
}

struct Draw {
    const float *logits, *maxima, *top;
    const int64_t *rows, *top_k;
    const double *temperature, *top_p, *min_p, *uniforms;
    int64_t* token_ids;
    int64_t count, vocab, threads;
};

// Where in the CDF made of `sums` the uniform lies.
struct Place {
    int64_t index;
    double rest;  // how far into it
};
inline Place find(const float* sums, int64_t n, double uniform) {
    double total = 0, edge = 0;
    for (int64_t i = 0; i < n; i++) total += (double)sums[i];
    double target = std::min(uniform * total, std::nextafter(total, 0.0));
    for (int64_t i = 0; i < n; i++) {
        double below = edge;
        edge += (double)sums[i];
        if (edge > target) return {i, target - below};
    }
    return {n - 1, 0};
}

// A gap, in units of the temperature, beyond which all tokens together weigh at most `spared`.
inline float spared_beyond(const float* sums, int64_t blocks, double spared) {
    float gap = 0;
    for (; gap < 80; gap += 0.5f) {
        vf most = splat(BLOCK * std::exp(-gap)), total{};  // what a block's tokens beyond it weigh at most
        for (int64_t b = 0; b < blocks; b += W) {
            vf sum = load_at(sums, b, blocks);
            total += sum < most ? sum : most;
        }
        if ((double)sum_lanes(total) <= spared) break;
    }
    return gap;
}

// The largest gap kept by min_p, top_k and top_p. sums: of the row's blocks; null where min_p or top_k bounds it, so
// that its mass is that of the tokens they keep.
inline float limit_of(const Draw& a, int64_t i, const Row& row, const float* maxima, Weights weights, const float* sums,
                      float* spare) {
    float top = weights.top;
    float limit = (float)(-std::log(a.min_p[i]) * a.temperature[i]);
    if (a.top_k[i] < a.vocab) {
        float bound = std::min(limit, kth_bound(maxima, row.blocks, top, a.top_k[i], spare));
        limit = std::min(limit, kth(spare, collect(row, maxima, top, bound, spare), a.top_k[i]));
    }
    if (!(a.top_p[i] < 1)) return limit;
    double mass = 0;
    float near = limit;
    auto weigh = [&](vf gap) { return weights.of_gaps(gap); };
    if (sums != nullptr) {
        for (int64_t b = 0; b < row.blocks; b++) mass += (double)sums[b];
        near = spared_beyond(sums, row.blocks, 0.99 * (1 - a.top_p[i]) * mass) / weights.scale;
    } else {
        int64_t n = collect(row, maxima, top, limit, spare);
        for (int64_t j = 0; j < n; j++) mass += (double)weigh(splat(spare[j]))[0];
    }
    // Where rounding has pushed the edge out of sight, look at all.
    for (float bound : {std::min(near, limit), limit}) {
        float edge = crossing(spare, collect(row, maxima, top, bound, spare), a.top_p[i] * mass, weigh);
        if (edge < INFINITE) return std::min(limit, edge);
    }
    return limit;
}

// threads: for this row alone.
inline int64_t draw_row(const Draw& a, int64_t i, int threads) {
    static thread_local Scratch scratch;
    Row row(a.logits + a.rows[i] * a.vocab, a.vocab);
    int64_t blocks = row.blocks;
    const float* maxima = a.maxima + a.rows[i] * blocks;
    float top = a.top[a.rows[i]];
    if (!std::isfinite(top)) return 0;
    float* sums = scratch.get<float>((size_t)(2 * blocks + blocks * BLOCK + W));
    int32_t* kept = (int32_t*)(sums + blocks);
    float* spare = sums + 2 * blocks;
    Weights weights{top, (float)(1 / a.temperature[i]), INFINITE};
    bool bounded = a.top_k[i] < a.vocab || a.min_p[i] > 0;
    if (!bounded)
        share_rows(blocks, BLOCK, threads, [&](int64_t first, int64_t last) {
            block_sums(row, weights, first, last, [](int64_t b) { return b; }, sums);
        });
    int64_t n = blocks;
    bool plain = !bounded && !(a.top_p[i] < 1);
    if (!plain) {
        weights.limit = limit_of(a, i, row, maxima, weights, bounded ? nullptr : sums, spare);
        n = 0;
        for (int64_t b = 0; b < blocks; b++) {
            kept[n] = (int32_t)b;
            n += top - maxima[b] <= weights.limit;
        }
        block_sums(row, weights, 0, n, [&](int64_t at) { return (int64_t)kept[at]; }, sums);
    }
    Place place = find(sums, n, a.uniforms[i]);
    int64_t block = plain ? place.index : kept[place.index];
    float within[BLOCK];
    for (int64_t v = 0; v < VECTORS; v++) store(within + v * W, weights.of(row.block(block) + v * W));
    double edge = 0, total = 0;
    for (float weight : within) total += (double)weight;
    double target = std::min(place.rest, std::nextafter(total, 0.0));  // the block's sum was rounded
    int64_t at = 0;
    for (; at < BLOCK - 1 && (edge += (double)within[at]) <= target;) at++;
    return block * BLOCK + at;
}

// Rows are shared among the threads; a row alone shares its blocks.
template <class F> void each_row(int64_t rows, int64_t vocab, int64_t threads, F&& work) {
    if (rows == 1) return work((int64_t)0, (int)threads);
    share(rows, rows * vocab < SMALL ? 1 : (int)threads, [&](int64_t i) { work(i, 1); });
}

inline void draw(const Draw& a) {
    each_row(a.count, a.vocab, a.threads, [&](int64_t i, int threads) { a.token_ids[i] = draw_row(a, i, threads); });
}

struct MaskLogits {
    float* logits;
    const int64_t* rows;
    const uint32_t* bits;  // [count, words], token t is bit t % 32 of word t / 32
    int64_t count, vocab, words, threads;
};

// -inf in place of those of 32 logits, or of the first n of them, whose bit is 0.
inline void mask_word(float* x, uint32_t bits, int64_t n) {
    if (bits == ~0u) return;
#if defined(__AVX512F__)
    uint32_t drop = ~bits & (n < 32 ? (1u << n) - 1 : ~0u);
    __m512 none = _mm512_set1_ps(-INFINITE);
    _mm512_mask_storeu_ps(x, (__mmask16)drop, none);
    _mm512_mask_storeu_ps(x + 16, (__mmask16)(drop >> 16), none);
#else
    if (n < 32) {
        for (int64_t i = 0; i < n; i++)
            if (!(bits >> i & 1)) x[i] = -INFINITE;
        return;
    }
    vi lanes;
    for (int i = 0; i < W; i++) lanes[i] = 1 << i;
    for (int i = 0; i < 32; i += W) {
        vi kept = ((vi{} + (int32_t)(bits >> i)) & lanes) != 0;
        store(x + i, kept ? load(x + i) : splat(-INFINITE));
    }
#endif
}

inline void mask_logits(const MaskLogits& a) {
    each_row(a.count, a.vocab, a.threads, [&](int64_t i, int threads) {
        float* x = a.logits + a.rows[i] * a.vocab;
        share_rows((a.vocab + 31) / 32, 32, threads, [&](int64_t first, int64_t last) {
            for (int64_t w = first; w < last; w++)
                mask_word(x + w * 32, a.bits[i * a.words + w], std::min<int64_t>(32, a.vocab - w * 32));
        });
    });
}

struct TakeLogprobs {
    const float* logits;
    const int64_t* token_ids;
    float* own;
    int64_t *ranks, *ids;
    float* values;
    int64_t rows, vocab, k, threads;
};

struct Candidate {
    float logit;
    int32_t id;
};

// The k most likely tokens, descending, the lower id first among equals; `out` has room for all tokens.
inline void most_likely(const Row& row, const float* maxima, float top, int64_t vocab, int64_t k, float* spare,
                        Candidate* out) {
    for (float bound : {kth_bound(maxima, row.blocks, top, k, spare), INFINITE}) {
        int64_t n = 0;
        for (int64_t b = 0; b < row.blocks; b++) {
            if (!(top - maxima[b] <= bound)) continue;
            const float* x = row.block(b);
            for (int64_t i = b * BLOCK; i < std::min(vocab, (b + 1) * BLOCK); i++) {
                out[n] = {x[i % BLOCK], (int32_t)i};
                n += top - x[i % BLOCK] <= bound;
            }
        }
        if (n < k) continue;  // the rest are infinite gaps
        // Not by gap: a difference that is lost there may still be one between the logits.
        auto before = [](Candidate a, Candidate b) {
            return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
        };
        std::partial_sort(out, out + k, out + n, before);
        return;
    }
}

inline void logprobs_row(const TakeLogprobs& a, int64_t r, int threads) {
    static thread_local Scratch scratch;
    const float* logits = a.logits + r * a.vocab;
    Row row(logits, a.vocab);
    int64_t blocks = row.blocks;
    float* maxima = scratch.get<float>((size_t)(3 * (blocks + blocks * BLOCK)));
    float *sums = maxima + blocks, *spare = sums + blocks;
    Candidate* found = (Candidate*)(spare + blocks);
    share_rows(blocks, BLOCK, threads, [&](int64_t first, int64_t last) { block_peaks(row, first, last, maxima); });
    float top = largest(maxima, blocks), normaliser = NAN, own = logits[a.token_ids[r]];
    if (std::isfinite(top)) {
        share_rows(blocks, BLOCK, threads, [&](int64_t first, int64_t last) {
            block_sums(row, Weights{top, 1, INFINITE}, first, last, [](int64_t b) { return b; }, sums);
        });
        double mass = 0;
        for (int64_t b = 0; b < blocks; b++) mass += (double)sums[b];
        normaliser = top + (float)std::log(mass);
        most_likely(row, maxima, top, a.vocab, a.k, spare, found);
    } else {
        for (int64_t i = 0; i < a.k; i++) found[i] = {logits[i], (int32_t)i};
    }
    vi greater{};
    for (int64_t b = 0; b < blocks; b++) {
        if (maxima[b] <= own) continue;
        for (int64_t v = 0; v < VECTORS; v++) greater -= load(row.block(b) + v * W) > splat(own);
    }
    a.ranks[r] = 1;
    for (int i = 0; i < W; i++) a.ranks[r] += greater[i];
    auto logprob = [&](float logit) {
        float x = logit - normaliser;
        return x < INFINITE ? x : -INFINITE;  // NaN too
    };
    a.own[r] = logprob(own);
    for (int64_t i = 0; i < a.k; i++) {
        a.ids[r * a.k + i] = found[i].id;
        a.values[r * a.k + i] = logprob(found[i].logit);
    }
}

inline void take_logprobs(const TakeLogprobs& a) {
    each_row(a.rows, a.vocab, a.threads, [&](int64_t r, int threads) { logprobs_row(a, r, threads); });
}

}  // namespace

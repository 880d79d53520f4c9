// Paged causal attention. Contract: kernels/ops.py. Softmax is online and in float32 (Milakov and Gimelshein 2018; Dao
// et al. 2022); long ranges of KV are split among threads when there is little else to share ("flash decoding").
//
// A tile is some consecutive tokens of one sequence times the query heads that read one KV head: all its rows use each
// K and V that is loaded. KV is visited in chunks, read from its blocks where it lies; slots nobody sees are never
// read. Rows of scores beyond what a query may see are dropped by position. The order of every sum: attention_tile.h.

#pragma once

#include "attention_few.h"
#include "attention_many.h"

namespace {

constexpr int64_t SMALL_ATTENTION = 1 << 19;  // multiply-adds, about 20 microseconds: below it the caller works alone

template <class T> inline void attend(const Attention& a, const Item& item, const Item* next) {
    static thread_local Scratch scratch;
    if (item.rows(a) <= FEW_ROWS)
        attend_few<T>(a, item, next, scratch);
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

inline int64_t work_of(const Attention& a, const Item& item) {
    return (item.end - item.begin) * (item.rows(a) + 4) * a.d;  // 4: loading a position costs about as much
}

template <class T> void paged_attention(const Attention& a) {
    int64_t work = 0;
    each_tile(a, [&](const Item& item) { work += work_of(a, item); });
    int threads = work < SMALL_ATTENTION ? 1 : a.threads;

    // A tile that would keep the others waiting is split. The parts, and what they add up to, are the same either way.
    auto parts_of = [&](const Item& item) {
        if (threads == 1 || work_of(a, item) * 4 * threads < work) return (int64_t)1;
        return (item.end - 1) / PART - item.begin / PART + 1;
    };
    int64_t count = 0, partial_floats = 0;
    each_tile(a, [&](const Item& item) {
        int64_t parts = parts_of(item);
        count += parts;
        if (parts > 1) partial_floats += parts * State::size(item.padded_rows(a), a.padded_d());
    });
    static thread_local Scratch plan, partials;
    Item* items = plan.get<Item>(count);
    float* partial = partial_floats > 0 ? partials.get<float>(partial_floats) : nullptr;
    int64_t n = 0;
    each_tile(a, [&](const Item& tile) {
        int64_t parts = parts_of(tile), begin = tile.begin;
        for (int64_t p = 0; p < parts; p++) {
            Item item = tile;
            item.parts = p == 0 ? (int32_t)parts : 0;
            if (parts > 1) {
                item.begin = begin, item.end = begin = part_end(begin, tile.end);
                item.partial = partial;
                partial += State::size(item.padded_rows(a), a.padded_d());
            }
            items[n++] = item;
        }
    });
    share(count, threads, [&](int64_t i) {
        attend<T>(a, items[i], i + threads < count ? &items[i + threads] : nullptr);
    });

    for (int64_t i = 0; i < count; i++) {
        const Item& first = items[i];
        if (first.parts <= 1) continue;
        int64_t rows = first.padded_rows(a), dp = a.padded_d();
        State whole(first.partial, rows, dp);
        for (int p = 1; p < first.parts; p++) whole.join(State(items[i + p].partial, rows, dp), first.rows(a), dp);
        store_out(a, first, whole);
    }
}

}  // namespace

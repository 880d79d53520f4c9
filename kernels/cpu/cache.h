// Writing and copying KV in the block pool [NB, Hkv, BS, D]. Contracts: kernels/ops.py. Strides count elements.

#pragma once

#include "simd.h"
#include "team.h"

namespace {

template <class T> inline void copy(T* to, const T* from, int64_t n) { memcpy(to, from, n * sizeof(T)); }
template <class To, class From> inline void copy(To* to, const From* from, int64_t n) {
    for (int64_t i = 0; i < n; i += W) store_at(to, i, n, load_at(from, i, n));
}

template <class From, class To>
void write_kv(const From* key, const From* value, To* keys, To* values, const int64_t* slots, int64_t tokens,
              int64_t heads, int64_t d, int64_t block_size, int64_t key_stride, int64_t key_head_stride,
              int64_t value_stride, int64_t value_head_stride, int64_t keys_stride, int64_t values_stride,
              int threads) {
    share_rows(tokens, 2 * heads * d, threads, [&](int64_t first, int64_t last) {
        for (int64_t t = first; t < last; t++) {
            if (slots[t] < 0) continue;
            int64_t block = slots[t] / block_size, offset = slots[t] % block_size;
            for (int64_t h = 0; h < heads; h++) {
                int64_t place = (h * block_size + offset) * d;
                copy(keys + block * keys_stride + place, key + t * key_stride + h * key_head_stride, d);
                copy(values + block * values_stride + place, value + t * value_stride + h * value_head_stride, d);
            }
        }
    });
}

// pairs: (source, destination) … ; a block is `bytes` long, blocks are `*_stride` bytes apart.
void copy_blocks(char* keys, char* values, const int64_t* pairs, int64_t n, int64_t bytes, int64_t keys_stride,
                 int64_t values_stride, int threads) {
    share_rows(n, bytes / 2, threads, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++) {
            int64_t source = pairs[2 * i], destination = pairs[2 * i + 1];
            memcpy(keys + destination * keys_stride, keys + source * keys_stride, bytes);
            memcpy(values + destination * values_stride, values + source * values_stride, bytes);
        }
    });
}

}  // namespace

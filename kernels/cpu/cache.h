// Writing and copying KV in the block pool [NB, Hkv, BS, D]. Contracts: kernels/ops.py. Strides count elements.
//
// In a cache of int8 [NB, Hkv, BS, D + 4] the BS rows of D values of a head come first, then their BS float32 scales.

#pragma once

#include <cmath>

#include "simd.h"
#include "team.h"

namespace {

template <class T> inline void copy(T* to, const T* from, int64_t n) { memcpy(to, from, n * sizeof(T)); }
template <class To, class From> inline void copy(To* to, const From* from, int64_t n) {
    for (int64_t i = 0; i < n; i += W) store_at(to, i, n, load_at(from, i, n));
}

template <class T> constexpr bool SCALED = sizeof(T) == 1;
template <class T> constexpr int64_t ROW_TAIL = SCALED<T> ? sizeof(float) : 0;  // what a row's scale adds to it

inline vf nearest(vf x) {
#if defined(__AVX512F__)
    return (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
    return (vf)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    for (int i = 0; i < W; i++) x[i] = __builtin_rintf(x[i]);
    return x;
#endif
}

// Returns the scale. The largest of a row becomes 127 or -127; a row that is not finite has a scale that is not.
template <class From> inline float quantize(int8_t* to, const From* from, int64_t d) {
    vf most{}, poison{};
    for (int64_t i = 0; i < d; i += W) {
        vf x = load_at(from, i, d);
        most = max((vf)((vi)x & 0x7fffffff), most);
        poison += x - x;
    }
    float top = max_lanes(most), spoiled = sum_lanes(poison), inverse = 127.f / top;
    if (!(spoiled == 0 && inverse < INFINITY)) {  // not finite, or nothing that float32 can divide by
        memset(to, 0, d);
        return spoiled;
    }
    for (int64_t i = 0; i < d; i += W) {
        vf x = nearest(load_at(from, i, d) * inverse);
        for (int l = 0; l < W && i + l < d; l++) to[i + l] = (int8_t)x[l];
    }
    return top / 127.f;
}

// One row of a head's BS.
template <class To, class From>
inline void put(To* head, int64_t offset, int64_t block_size, const From* from, int64_t d) {
    if constexpr (SCALED<To>) {
        float scale = quantize(head + offset * d, from, d);
        memcpy(head + block_size * d + offset * sizeof scale, &scale, sizeof scale);
    } else {
        copy(head + offset * d, from, d);
    }
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
                int64_t head = h * block_size * (d + ROW_TAIL<To>);
                const From* k = key + t * key_stride + h * key_head_stride;
                const From* v = value + t * value_stride + h * value_head_stride;
                put(keys + block * keys_stride + head, offset, block_size, k, d);
                put(values + block * values_stride + head, offset, block_size, v, d);
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

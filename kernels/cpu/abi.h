// The C ABI: raw pointers and ints, no torch. Called by kernels/cpu/library.py, which checks shapes and strides.
// A flag `…bf16` says that the tensor is bfloat16, else it is float32. Sizes and strides count elements, for copy_blocks
// bytes.

#pragma once

#include "attention.h"
#include "cache.h"
#include "rows.h"

#define OCTAVO_API extern "C" __attribute__((visibility("default")))

OCTAVO_API void octavo_set_fork(void* fork) { fork_team = (Fork)fork; }

OCTAVO_API void octavo_paged_attention(void* out, const void* query, const void* keys, const void* values,
                                       const int32_t* tables, const int32_t* query_start, const int32_t* context_lens,
                                       int64_t query_stride, int64_t query_head_stride, int64_t keys_stride,
                                       int64_t values_stride, int64_t table_stride, int64_t sequences,
                                       int64_t query_heads, int64_t kv_heads, int64_t d, int64_t block_size,
                                       float scale, int64_t window, float cap, int query_bf16, int cache_bf16,
                                       int threads) {
    Attention a;
    a.out = out, a.query = query, a.keys = keys, a.values = values;
    a.tables = tables, a.query_start = query_start, a.context_lens = context_lens;
    a.query_stride = query_stride, a.query_head_stride = query_head_stride;
    a.keys_stride = keys_stride, a.values_stride = values_stride, a.table_stride = table_stride;
    a.sequences = sequences, a.query_heads = query_heads, a.kv_heads = kv_heads, a.d = d, a.block_size = block_size;
    a.scale = scale, a.window = window, a.cap = cap, a.query_bf16 = query_bf16 != 0, a.threads = threads;
    if (cache_bf16)
        paged_attention<bf16>(a);
    else
        paged_attention<float>(a);
}

OCTAVO_API void octavo_write_kv(const void* key, const void* value, void* keys, void* values, const int64_t* slots,
                                int64_t tokens, int64_t heads, int64_t d, int64_t block_size, int64_t key_stride,
                                int64_t key_head_stride, int64_t value_stride, int64_t value_head_stride,
                                int64_t keys_stride, int64_t values_stride, int bf16_, int cache_bf16, int threads) {
    auto run = [&](auto* k, auto* v, auto* kc, auto* vc) {
        write_kv(k, v, kc, vc, slots, tokens, heads, d, block_size, key_stride, key_head_stride, value_stride,
                 value_head_stride, keys_stride, values_stride, threads);
    };
    auto from = [&](auto* k, auto* v) {
        if (cache_bf16)
            run(k, v, (bf16*)keys, (bf16*)values);
        else
            run(k, v, (float*)keys, (float*)values);
    };
    if (bf16_)
        from((const bf16*)key, (const bf16*)value);
    else
        from((const float*)key, (const float*)value);
}

OCTAVO_API void octavo_copy_blocks(void* keys, void* values, const int64_t* pairs, int64_t n, int64_t bytes,
                                   int64_t keys_stride, int64_t values_stride, int threads) {
    copy_blocks((char*)keys, (char*)values, pairs, n, bytes, keys_stride, values_stride, threads);
}

OCTAVO_API void octavo_rms_norm(void* out, const void* x, const void* weight, int64_t outer, int64_t inner,
                                int64_t outer_stride, int64_t inner_stride, int64_t m, float eps, int x_bf16,
                                int weight_bf16, int threads) {
    auto run = [&](auto* o, auto* from, auto* w) {
        rms_norm(o, from, w, outer, inner, outer_stride, inner_stride, m, eps, threads);
    };
    if (x_bf16 && weight_bf16)
        run((bf16*)out, (const bf16*)x, (const bf16*)weight);
    else if (x_bf16)
        run((bf16*)out, (const bf16*)x, (const float*)weight);
    else if (weight_bf16)
        run((float*)out, (const float*)x, (const bf16*)weight);
    else
        run((float*)out, (const float*)x, (const float*)weight);
}

OCTAVO_API void octavo_add_rms_norm(void* x, void* residual, const void* weight, int64_t rows, int64_t x_stride,
                                    int64_t residual_stride, int64_t m, float eps, int x_bf16, int weight_bf16,
                                    int threads) {
    auto run = [&](auto* a, auto* b, auto* w) {
        add_rms_norm(a, b, w, rows, x_stride, residual_stride, m, eps, threads);
    };
    if (x_bf16 && weight_bf16)
        run((bf16*)x, (bf16*)residual, (const bf16*)weight);
    else if (x_bf16)
        run((bf16*)x, (bf16*)residual, (const float*)weight);
    else if (weight_bf16)
        run((float*)x, (float*)residual, (const bf16*)weight);
    else
        run((float*)x, (float*)residual, (const float*)weight);
}

OCTAVO_API void octavo_rotary(void* query, void* key, const int64_t* positions, const float* cos_sin, int64_t tokens,
                              int64_t query_heads, int64_t key_heads, int64_t query_stride, int64_t query_head_stride,
                              int64_t key_stride, int64_t key_head_stride, int64_t rotated, int bf16_, int threads) {
    auto run = [&](auto* q, auto* k) {
        rotary(q, k, positions, cos_sin, tokens, query_heads, key_heads, query_stride, query_head_stride, key_stride,
               key_head_stride, rotated, threads);
    };
    if (bf16_)
        run((bf16*)query, (bf16*)key);
    else
        run((float*)query, (float*)key);
}

OCTAVO_API void octavo_silu_and_mul(void* out, const void* x, int64_t rows, int64_t stride, int64_t f, int bf16_,
                                    int threads) {
    if (bf16_)
        act_and_mul<Silu>((bf16*)out, (const bf16*)x, rows, stride, f, threads);
    else
        act_and_mul<Silu>((float*)out, (const float*)x, rows, stride, f, threads);
}

OCTAVO_API void octavo_gelu_tanh_and_mul(void* out, const void* x, int64_t rows, int64_t stride, int64_t f, int bf16_,
                                         int threads) {
    if (bf16_)
        act_and_mul<GeluTanh>((bf16*)out, (const bf16*)x, rows, stride, f, threads);
    else
        act_and_mul<GeluTanh>((float*)out, (const float*)x, rows, stride, f, threads);
}

// The C ABI: every op takes one struct of 8-byte fields, pointers first where that reads well; no torch. Filled in by
// kernels/cpu/library.py, whose table of fields must agree with the structs here. A call is thus a function and a run of
// bytes, which a graph can keep and repeat (octavo_replay). A flag `…bf16` says that the tensor is bfloat16, else it is
// float32. Sizes and strides count elements, for copy_blocks bytes.

#pragma once

#include <chrono>

#include "attention.h"
#include "cache.h"
#include "linear.h"
#include "rows.h"
#include "sampling.h"

#define OCTAVO_API extern "C" __attribute__((visibility("default")))

OCTAVO_API void octavo_set_fork(void* fork) { fork_team = (Fork)fork; }

// A graph: calls in order, each with its op and where its arguments begin.
struct Call {
    void (*op)(const void* arguments);
    const void* arguments;
};
// nanoseconds: [count], of each call; or null.
OCTAVO_API void octavo_replay(const Call* calls, int64_t count, int64_t threads, int64_t* nanoseconds) {
    auto now = [] { return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1); };
    Crew::gather((int)threads, [&] {
        for (int64_t i = 0; i < count; i++) {
            int64_t begin = nanoseconds == nullptr ? 0 : now();
            calls[i].op(calls[i].arguments);
            if (nanoseconds != nullptr) nanoseconds[i] = now() - begin;
        }
    });
}

enum CacheType : int64_t { CACHE_FLOAT32, CACHE_BFLOAT16, CACHE_INT8 };

struct PagedAttentionArguments {
    void* out;
    const void *query, *keys, *values;
    const int32_t *tables, *query_start, *context_lens;
    int64_t query_stride, query_head_stride, keys_stride, values_stride, table_stride;
    int64_t sequences, query_heads, kv_heads, d, block_size;
    double scale;
    int64_t window;
    double cap;
    int64_t query_bf16, cache, threads;  // cache: a CacheType
};
OCTAVO_API void octavo_paged_attention(const PagedAttentionArguments* of) {
    Attention a;
    a.out = of->out, a.query = of->query, a.keys = of->keys, a.values = of->values;
    a.tables = of->tables, a.query_start = of->query_start, a.context_lens = of->context_lens;
    a.query_stride = of->query_stride, a.query_head_stride = of->query_head_stride;
    a.keys_stride = of->keys_stride, a.values_stride = of->values_stride, a.table_stride = of->table_stride;
    a.sequences = of->sequences, a.query_heads = of->query_heads, a.kv_heads = of->kv_heads;
    a.d = of->d, a.block_size = of->block_size;
    a.scale = (float)of->scale, a.window = of->window, a.cap = (float)of->cap;
    a.query_bf16 = of->query_bf16 != 0, a.threads = (int)of->threads;
    switch (of->cache) {
        case CACHE_FLOAT32: return paged_attention<float>(a);
        case CACHE_BFLOAT16: return paged_attention<bf16>(a);
        case CACHE_INT8: return paged_attention<int8_t>(a);
    }
}

struct WriteKVArguments {
    const void *key, *value;
    void *keys, *values;
    const int64_t* slots;
    int64_t tokens, heads, d, block_size, key_stride, key_head_stride, value_stride, value_head_stride;
    int64_t keys_stride, values_stride, bf16_, cache, threads;  // cache: a CacheType
};
OCTAVO_API void octavo_write_kv(const WriteKVArguments* of) {
    auto run = [&](auto* k, auto* v, auto* kc, auto* vc) {
        write_kv(k, v, kc, vc, of->slots, of->tokens, of->heads, of->d, of->block_size, of->key_stride,
                 of->key_head_stride, of->value_stride, of->value_head_stride, of->keys_stride, of->values_stride,
                 (int)of->threads);
    };
    auto from = [&](auto* k, auto* v) {
        switch (of->cache) {
            case CACHE_FLOAT32: return run(k, v, (float*)of->keys, (float*)of->values);
            case CACHE_BFLOAT16: return run(k, v, (bf16*)of->keys, (bf16*)of->values);
            case CACHE_INT8: return run(k, v, (int8_t*)of->keys, (int8_t*)of->values);
        }
    };
    if (of->bf16_)
        from((const bf16*)of->key, (const bf16*)of->value);
    else
        from((const float*)of->key, (const float*)of->value);
}

struct CopyBlocksArguments {
    void *keys, *values;
    const int64_t* pairs;
    int64_t n, bytes, keys_stride, values_stride, threads;
};
OCTAVO_API void octavo_copy_blocks(const CopyBlocksArguments* of) {
    copy_blocks((char*)of->keys, (char*)of->values, of->pairs, of->n, of->bytes, of->keys_stride, of->values_stride,
                (int)of->threads);
}

struct RMSNormArguments {
    void* out;
    const void *x, *weight;
    int64_t outer, inner, outer_stride, inner_stride, m;
    double eps;
    int64_t x_bf16, weight_bf16, threads;
};
OCTAVO_API void octavo_rms_norm(const RMSNormArguments* of) {
    auto run = [&](auto* out, auto* x, auto* weight) {
        rms_norm(out, x, weight, of->outer, of->inner, of->outer_stride, of->inner_stride, of->m, (float)of->eps,
                 (int)of->threads);
    };
    if (of->x_bf16 && of->weight_bf16)
        run((bf16*)of->out, (const bf16*)of->x, (const bf16*)of->weight);
    else if (of->x_bf16)
        run((bf16*)of->out, (const bf16*)of->x, (const float*)of->weight);
    else if (of->weight_bf16)
        run((float*)of->out, (const float*)of->x, (const bf16*)of->weight);
    else
        run((float*)of->out, (const float*)of->x, (const float*)of->weight);
}

struct AddRMSNormArguments {
    void *x, *residual;
    const void* weight;
    int64_t rows, x_stride, residual_stride, m;
    double eps;
    int64_t x_bf16, weight_bf16, threads;
};
OCTAVO_API void octavo_add_rms_norm(const AddRMSNormArguments* of) {
    auto run = [&](auto* x, auto* residual, auto* weight) {
        add_rms_norm(x, residual, weight, of->rows, of->x_stride, of->residual_stride, of->m, (float)of->eps,
                     (int)of->threads);
    };
    if (of->x_bf16 && of->weight_bf16)
        run((bf16*)of->x, (bf16*)of->residual, (const bf16*)of->weight);
    else if (of->x_bf16)
        run((bf16*)of->x, (bf16*)of->residual, (const float*)of->weight);
    else if (of->weight_bf16)
        run((float*)of->x, (float*)of->residual, (const bf16*)of->weight);
    else
        run((float*)of->x, (float*)of->residual, (const float*)of->weight);
}

struct RotaryArguments {
    void *query, *key;
    const int64_t* positions;
    const float* cos_sin;
    int64_t tokens, query_heads, key_heads, query_stride, query_head_stride, key_stride, key_head_stride, rotated;
    int64_t bf16_, threads;
};
OCTAVO_API void octavo_rotary(const RotaryArguments* of) {
    auto run = [&](auto* query, auto* key) {
        rotary(query, key, of->positions, of->cos_sin, of->tokens, of->query_heads, of->key_heads, of->query_stride,
               of->query_head_stride, of->key_stride, of->key_head_stride, of->rotated, (int)of->threads);
    };
    if (of->bf16_)
        run((bf16*)of->query, (bf16*)of->key);
    else
        run((float*)of->query, (float*)of->key);
}

struct GatedArguments {
    void* out;
    const void* x;
    int64_t rows, stride, f, bf16_, threads;
};
template <class Act> inline void gated(const GatedArguments* of) {
    if (of->bf16_)
        act_and_mul<Act>((bf16*)of->out, (const bf16*)of->x, of->rows, of->stride, of->f, (int)of->threads);
    else
        act_and_mul<Act>((float*)of->out, (const float*)of->x, of->rows, of->stride, of->f, (int)of->threads);
}
OCTAVO_API void octavo_silu_and_mul(const GatedArguments* of) { gated<Silu>(of); }
OCTAVO_API void octavo_gelu_tanh_and_mul(const GatedArguments* of) { gated<GeluTanh>(of); }

OCTAVO_API void octavo_gelu_tanh(const GatedArguments* of) {
    if (of->bf16_)
        activate<GeluTanh>((bf16*)of->out, (const bf16*)of->x, of->rows, of->stride, of->f, (int)of->threads);
    else
        activate<GeluTanh>((float*)of->out, (const float*)of->x, of->rows, of->stride, of->f, (int)of->threads);
}

OCTAVO_API void octavo_linear(const Linear* of) { linear(*of); }

struct EmbeddingArguments {
    void* out;
    const int64_t* ids;
    int64_t count;
    Linear matrix;  // its weight, sizes and form; out and x are not used
};
OCTAVO_API void octavo_embedding(const EmbeddingArguments* of) { embedding(of->matrix, of->out, of->ids, of->count); }

OCTAVO_API void octavo_find_peaks(const FindPeaks* of) { find_peaks(*of); }
OCTAVO_API void octavo_mask_logits(const MaskLogits* of) { mask_logits(*of); }
OCTAVO_API void octavo_draw(const Draw* of) { draw(*of); }
OCTAVO_API void octavo_take_logprobs(const TakeLogprobs* of) { take_logprobs(*of); }

// Ops that work on each row by itself: norms, rotary embedding, gated activations. Contracts: kernels/ops.py.
// Strides count elements. Everything is computed in float32.

#pragma once

#include <cmath>

#include "simd.h"
#include "team.h"

namespace {

// x's rows are addressed by two indices, since a norm over heads sees a slice of the fused projection.
template <class T, class V>
void rms_norm(T* out, const T* x, const V* weight, int64_t outer, int64_t inner, int64_t outer_stride,
              int64_t inner_stride, int64_t m, float eps, int threads) {
    share_rows(outer * inner, m, threads, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row++) {
            const T* from = x + row / inner * outer_stride + row % inner * inner_stride;
            T* to = out + row * m;
            vf squares{};
            for (int64_t i = 0; i < m; i += W) {
                vf v = load_at(from, i, m);
                squares += v * v;
            }
            float scale = 1.f / std::sqrt(sum_lanes(squares) / (float)m + eps);
            for (int64_t i = 0; i < m; i += W)
                store_at(to, i, m, load_at(from, i, m) * scale * load_at(weight, i, m));
        }
    });
}

// residual += x; x = norm of it. As in the definition, the norm sees the sum as it was rounded to T.
template <class T, class V>
void add_rms_norm(T* x, T* residual, const V* weight, int64_t rows, int64_t x_stride, int64_t residual_stride,
                  int64_t m, float eps, int threads) {
    share_rows(rows, 2 * m, threads, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row++) {
            T* a = x + row * x_stride;
            T* b = residual + row * residual_stride;
            vf squares{};
            for (int64_t i = 0; i < m; i += W) {
                store_at(b, i, m, load_at(a, i, m) + load_at(b, i, m));
                vf v = load_at(b, i, m);
                squares += v * v;
            }
            float scale = 1.f / std::sqrt(sum_lanes(squares) / (float)m + eps);
            for (int64_t i = 0; i < m; i += W) store_at(a, i, m, load_at(b, i, m) * scale * load_at(weight, i, m));
        }
    });
}

template <class T> inline void rotate(T* x, const float* cos_sin, int64_t half) {
    for (int64_t i = 0; i < half; i += W) {
        vf cos = load_at(cos_sin, i, half), sin = load_at(cos_sin + half, i, half);
        vf first = load_at(x, i, half), second = load_at(x + half, i, half);
        store_at(x, i, half, first * cos - second * sin);
        store_at(x + half, i, half, second * cos + first * sin);
    }
}

// In place. query's token t, head h begins at t * query_stride + h * query_head_stride.
template <class T>
void rotary(T* query, T* key, const int64_t* positions, const float* cos_sin, int64_t tokens, int64_t query_heads,
            int64_t key_heads, int64_t query_stride, int64_t query_head_stride, int64_t key_stride,
            int64_t key_head_stride, int64_t rotated, int threads) {
    share_rows(tokens, (query_heads + key_heads) * rotated, threads, [&](int64_t first, int64_t last) {
        for (int64_t t = first; t < last; t++) {
            const float* angles = cos_sin + positions[t] * rotated;
            for (int64_t h = 0; h < query_heads; h++)
                rotate(query + t * query_stride + h * query_head_stride, angles, rotated / 2);
            for (int64_t h = 0; h < key_heads; h++)
                rotate(key + t * key_stride + h * key_head_stride, angles, rotated / 2);
        }
    });
}

struct Silu {
    vf operator()(vf x) const { return x / (1.f + exp(-x)); }
};
struct GeluTanh {
    vf operator()(vf x) const { return 0.5f * x * (1.f + tanh(0.7978845608f * (x + 0.044715f * x * x * x))); }
};

template <class Act, class T>
void act_and_mul(T* out, const T* x, int64_t rows, int64_t stride, int64_t f, int threads) {
    Act act;
    share_rows(rows, 2 * f, threads, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row++) {
            const T* gate = x + row * stride;
            const T* up = gate + f;
            T* to = out + row * f;
            for (int64_t i = 0; i < f; i += W) store_at(to, i, f, act(load_at(gate, i, f)) * load_at(up, i, f));
        }
    });
}

template <class Act, class T>
void activate(T* out, const T* x, int64_t rows, int64_t stride, int64_t f, int threads) {
    Act act;
    share_rows(rows, f, threads, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row++)
            for (int64_t i = 0; i < f; i += W) store_at(out + row * f, i, f, act(load_at(x + row * stride, i, f)));
    });
}

}  // namespace

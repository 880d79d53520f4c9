"""Rotary position embedding, half-split pairing, in place. Shapes and contracts: `octavo.kernels.ops`."""

import torch
import triton
import triton.language as tl

HEADS = 32  # that a program rotates, at most
WARPS = 4


@triton.jit
def _rotate(
    x,  # this token's [num_heads, D], heads `stride` apart
    first_head,
    num_heads,
    stride,
    cos,  # [HALF]
    sin,
    half: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
):
    head = first_head + tl.arange(0, HEADS)
    component = tl.arange(0, HALF)
    held = (head < num_heads)[:, None] & (component < half)[None, :]
    at = x + head[:, None] * stride + component[None, :]
    first = tl.load(at, mask=held, other=0.0).to(tl.float32)
    second = tl.load(at + half, mask=held, other=0.0).to(tl.float32)
    tl.store(at, (first * cos[None, :] - second * sin[None, :]).to(x.dtype.element_ty), mask=held)
    tl.store(at + half, (second * cos[None, :] + first * sin[None, :]).to(x.dtype.element_ty), mask=held)


@triton.jit
def _rotary(
    query,  # [T, num_heads, D]
    key,  # [T, num_kv_heads, D]
    positions,  # [T]
    cos_sin,  # [P, 2 * half], rows cos_sin_stride apart
    num_heads,
    num_kv_heads,
    query_token,
    query_head,
    key_token,
    key_head,
    cos_sin_stride,
    half: tl.constexpr,
    HALF: tl.constexpr,  # padded to a power of two
    HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    first_head = tl.program_id(1) * HEADS
    component = tl.arange(0, HALF)
    row = cos_sin + tl.load(positions + token) * cos_sin_stride + component
    cos = tl.load(row, mask=component < half, other=0.0)
    sin = tl.load(row + half, mask=component < half, other=0.0)
    if first_head < num_heads:
        _rotate(query + token * query_token, first_head, num_heads, query_head, cos, sin, half, HALF, HEADS)
    if first_head < num_kv_heads:
        _rotate(key + token * key_token, first_head, num_kv_heads, key_head, cos, sin, half, HALF, HEADS)


def rotary(
    query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    query, key = (x if x.stride(2) == 1 else x.contiguous() for x in (query, key))
    num_tokens, num_heads, _ = query.shape
    if num_tokens == 0:
        return query, key
    half, most = cos_sin.shape[1] // 2, max(num_heads, key.shape[1])
    heads = min(HEADS, triton.next_power_of_2(most))
    _rotary[(num_tokens, triton.cdiv(most, heads))](
        query,
        key,
        positions,
        cos_sin,
        num_heads,
        key.shape[1],
        *query.stride()[:2],
        *key.stride()[:2],
        cos_sin.stride(0),
        half,
        HALF=triton.next_power_of_2(half),
        HEADS=heads,
        num_warps=WARPS,
    )
    return query, key

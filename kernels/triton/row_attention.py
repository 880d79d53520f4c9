"""Bidirectional attention within rows: an encoder's. Shapes and contract: `octavo.kernels.ops`."""

import torch
import triton
import triton.language as tl

from octavo.kernels.ops import AttentionBatch
from octavo.kernels.triton.attention_tile import PRECISION, find_sequence, fold

LOG2_E = 1.4426950408889634
# Bytes of an element → (padded head size up to, queries of a program, KV positions of a step, warps, stages).
TILES = {
    2: ((64, 64, 64, 4, 3), (128, 64, 64, 4, 2), (256, 64, 32, 4, 2)),
    4: ((64, 64, 32, 4, 2), (128, 32, 32, 4, 2), (256, 32, 16, 8, 2)),
}


@triton.jit(do_not_specialize=["num_rows"])
def _attend_rows(
    out,  # [T, Hq, D], contiguous
    query,  # [T, Hq, D]
    key,  # [T, Hkv, D]
    value,
    query_start,  # [S + 1]
    num_rows,
    scale,  # times log2 e
    query_token,
    query_head,
    key_token,
    key_head,
    value_token,
    value_head,
    num_heads,
    head_size: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,  # padded to a power of two
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: (tiles of queries, Hq)."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    row = find_sequence(query_start, tile, num_rows, BLOCK_M)
    begin = tl.load(query_start + row)
    end = tl.load(query_start + row + 1)
    first = begin + (tile - begin // BLOCK_M - row) * BLOCK_M
    if first < end:
        component = tl.arange(0, HEAD)
        token = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
        held = (token < end)[:, None] & (component < head_size)[None, :]
        at = token[:, None] * query_token + head * query_head + component[None, :]
        queries = tl.load(query + at, mask=held, other=0.0)
        key += head // GROUP * key_head
        value += head // GROUP * value_head
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        mass = tl.zeros([BLOCK_M], tl.float32)
        sums = tl.zeros([BLOCK_M, HEAD], tl.float32)
        for start in tl.range(begin, end, BLOCK_N):
            other = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
            real = other < end
            mask = real[None, :] & (component < head_size)[:, None]
            keys = tl.load(key + other[None, :] * key_token + component[:, None], mask=mask, other=0.0)
            scores = tl.dot(queries, keys, input_precision=PRECISION) * scale
            scores = tl.where(real[None, :], scores, float("-inf"))
            weights, shrink, top, mass = fold(scores, top, mass)
            mask = real[:, None] & (component < head_size)[None, :]
            values = tl.load(value + other[:, None] * value_token + component[None, :], mask=mask, other=0.0)
            sums = tl.dot(weights.to(values.dtype), values, sums * shrink[:, None], input_precision=PRECISION)
        to = (token[:, None] * num_heads + head) * head_size + component[None, :]
        tl.store(out + to, (sums / mass[:, None]).to(out.dtype.element_ty), mask=held)


def row_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: AttentionBatch, scale: float
) -> torch.Tensor:
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if query.numel() == 0:
        return out
    query, key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (query, key, value))
    num_tokens, num_heads, head_size = query.shape
    num_rows, head = len(batch.query_start) - 1, max(16, triton.next_power_of_2(head_size))
    tiles = TILES[query.itemsize]
    _, block_m, block_n, warps, stages = next((tile for tile in tiles if head <= tile[0]), tiles[-1])
    _attend_rows[(num_tokens // block_m + num_rows, num_heads)](
        out,
        query,
        key,
        value,
        batch.query_start,
        num_rows,
        scale * LOG2_E,
        *query.stride()[:2],
        *key.stride()[:2],
        *value.stride()[:2],
        num_heads,
        head_size,
        GROUP=num_heads // key.shape[1],
        HEAD=head,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=warps,
        num_stages=stages,
    )
    return out

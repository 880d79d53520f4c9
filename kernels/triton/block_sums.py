"""Sums of the tokens' weights, block by block: what draws and log probabilities share.

A token's gap is the row's largest logit minus its own; its weight is exp(-gap / temperature), 0 for gaps beyond the
row's limit. Weights are float32, sums float64: the order of adding is then of no consequence for any draw, except where
a uniform lies within 1e-15 of an edge.
"""

import torch
import triton
import triton.language as tl

from octavo.kernels.sampling import BLOCK

BLOCKS = 32  # a program's
WARPS = 4


@triton.jit
def gaps_of(x, top):
    """Never -0, so that gaps order as their bits do."""
    return tl.abs(top - x)


@triton.jit
def weights_of(gaps, scale, limit):
    return tl.where(gaps <= limit, tl.exp(gaps * -scale), 0.0)


@triton.jit
def _sum_blocks(
    sums,  # [N, blocks] float64
    logits,  # [R, vocab]
    maxima,  # [R, blocks]
    top,  # [R]
    rows,  # [N] float64: which of the R
    scales,  # [N] float64: 1 / temperature
    limits,  # [N] float32
    vocab,
    blocks,
    AGAIN: tl.constexpr,  # the sums without limits are there already
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + at).to(tl.int64)
    scale, limit = tl.load(scales + at).to(tl.float32), tl.load(limits + at)
    if (limit < float("inf")) | (not AGAIN):
        block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
        most = tl.load(top + row)
        peak = tl.load(maxima + row * blocks + block, mask=block < blocks, other=-float("inf"))
        kept = gaps_of(peak, most) <= limit  # the others are not read
        token = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        x = tl.load(logits + row * vocab + token, mask=kept[:, None] & (token < vocab), other=-float("inf"))
        weight = weights_of(gaps_of(x, most), scale, limit)
        tl.store(sums + at * blocks + block, tl.sum(weight.to(tl.float64), axis=1), mask=block < blocks)


def sum_blocks(
    sums: torch.Tensor,
    logits: torch.Tensor,
    maxima: torch.Tensor,
    top: torch.Tensor,
    rows: torch.Tensor,
    scales: torch.Tensor,
    limits: torch.Tensor,
    again: bool = False,
) -> None:
    """Fill sums [N, NB] float64; again: where there is a limit below infinity, and leave the others as they are.

    logits: [R, V] float32 contiguous, maxima [R, NB] and top [R] its peaks. rows, scales: [N] float64. limits: [N]
    float32, the largest gap that counts.
    """
    count, blocks = sums.shape
    grid = (count, triton.cdiv(blocks, BLOCKS))
    vocab = logits.shape[1]
    _sum_blocks[grid](
        sums,
        logits,
        maxima,
        top,
        rows,
        scales,
        limits,
        vocab,
        blocks,
        AGAIN=again,
        BLOCK=BLOCK,
        BLOCKS=BLOCKS,
        num_warps=WARPS,
    )

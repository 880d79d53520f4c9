"""Largest logits, per block and per row. Shapes and contract: `octavo.kernels.ops.FindPeaks`.

Two launches, so that a single row is read by many processors: maxima of blocks, then one program per row over them.
"""

import torch
import triton
import triton.language as tl

from octavo.kernels.sampling import BLOCK, Peaks

BLOCKS = 64  # a program's: 16 KiB of logits
WARPS = 8


@triton.jit
def _find_maxima(
    maxima,  # [R, blocks]
    logits,  # [R, vocab]
    vocab,
    blocks,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    token = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(logits + row * vocab + token, mask=token < vocab, other=-float("inf"))
    holds_nan = tl.max((x != x).to(tl.int32), axis=1) > 0
    most = tl.max(tl.where(x != x, -float("inf"), x), axis=1)
    tl.store(maxima + row * blocks + block, tl.where(holds_nan, float("nan"), most), mask=block < blocks)


@triton.jit
def _find_tops(
    top,  # [R]
    token_ids,  # [R] int64
    maxima,  # [R, blocks]
    logits,  # [R, vocab]
    vocab,
    blocks,
    BLOCK: tl.constexpr,
    ALL: tl.constexpr,  # blocks, to the next power of two
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, ALL)
    x = tl.load(maxima + row * blocks + block, mask=block < blocks, other=-float("inf"))
    holds_nan = tl.max((x != x).to(tl.int32)) > 0
    most = tl.where(holds_nan, float("nan"), tl.max(tl.where(x != x, -float("inf"), x)))
    tl.store(top + row, most)
    first = tl.min(tl.where(x == most, block, ALL))  # ALL: of NaN; nothing is read there
    place = tl.arange(0, BLOCK)
    token = first * BLOCK + place
    x = tl.load(logits + row * vocab + token, mask=token < vocab, other=float("nan"))
    found = first * BLOCK + tl.min(tl.where(x == most, place, BLOCK))
    tl.store(token_ids + row, tl.where(tl.abs(most) < float("inf"), found, 0).to(tl.int64))


def find_peaks(logits: torch.Tensor) -> Peaks:
    """Raises ValueError for other logits than contiguous float32."""
    maxima = block_maxima(logits)
    (rows, blocks), vocab = maxima.shape, logits.shape[1]
    top = torch.empty(rows, device=logits.device)
    token_ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        whole = triton.next_power_of_2(blocks)
        _find_tops[(rows,)](top, token_ids, maxima, logits, vocab, blocks, BLOCK=BLOCK, ALL=whole, num_warps=WARPS)
    return Peaks(maxima, top, token_ids)


def block_maxima(logits: torch.Tensor) -> torch.Tensor:
    """[R, NB] float32. Raises ValueError for other logits than contiguous float32 [R, V]."""
    check_logits(logits)
    rows, vocab = logits.shape
    blocks = triton.cdiv(vocab, BLOCK)
    maxima = torch.empty(rows, blocks, device=logits.device)
    if rows:
        grid = (rows, triton.cdiv(blocks, BLOCKS))
        _find_maxima[grid](maxima, logits, vocab, blocks, BLOCK=BLOCK, BLOCKS=BLOCKS, num_warps=WARPS)
    return maxima


def check_logits(logits: torch.Tensor) -> None:
    if logits.dtype != torch.float32 or not logits.is_contiguous():
        raise ValueError(f"logits must be contiguous float32, not {logits.dtype} with strides {logits.stride()}")

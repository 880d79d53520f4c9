"""Activations rounded to 8 bits, one scale per row and group of inputs: what matmuls of 8-bit weights multiply with.

int8: to the nearest of 127 steps, ties to even; float8 e4m3: the largest magnitude of a group becomes 448. As
`octavo.kernels.ref.linear.round_rows` does, to the bit: divisions are exact ones, and no product is added to anything
before it is rounded (`enable_fp_fusion=False` in every launch of a kernel that rounds).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo.kernels.rounded import Rounded, Rounding

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
TILE = 4096  # numbers of a program, where a group has fewer
# (longest group, warps)
WARPS = ((4096, 4), (16384, 8), (1 << 30, 16))


@triton.jit
def round_groups(v, LARGEST: tl.constexpr, INTEGERS: tl.constexpr):
    """v: [N, SIZE] float32 → (the numbers that 8 bits hold [N, SIZE] float32, scales [N])."""
    top = tl.max(tl.abs(v), axis=1)
    broken = tl.sum(v * 0.0, axis=1)  # NaN where v is not finite, else 0
    largest = tl.full(top.shape, LARGEST, tl.float32)
    inverse = tl.div_rn(largest, top)
    rounds = inverse < float("inf")  # not if all is 0, or as good as 0
    scale = tl.where(broken == 0.0, tl.where(rounds, tl.div_rn(top, largest), 0.0), float("nan"))
    q = v * tl.where(rounds & (broken == 0.0), inverse, 0.0)[:, None]
    q = tl.where(broken[:, None] == 0.0, q, 0.0)
    if INTEGERS:
        q = (q + 12582912.0) - 12582912.0  # 1.5 × 2^23: beyond it there are no fractions
    else:
        q = tl.minimum(tl.maximum(q, -LARGEST), LARGEST)
    return q, scale


@triton.jit
def store_rounded(
    values,  # [count, width] int8 or float8, contiguous
    scales,  # [count, width / SIZE]
    v,  # [ROWS, WIDTH] float32, 0 beyond the width
    row,  # [ROWS] int64
    first,  # column: a multiple of SIZE
    count,
    width,
    SIZE: tl.constexpr,  # numbers of a group: a power of two that divides the width, or WIDTH for all of a row
    LARGEST: tl.constexpr,
    INTEGERS: tl.constexpr,
):
    """Round the rows of a tile and store them, for kernels that have computed them."""
    ROWS: tl.constexpr = v.shape[0]
    GROUPS: tl.constexpr = v.shape[1] // SIZE
    q, scale = round_groups(tl.reshape(v, [ROWS * GROUPS, SIZE]), LARGEST, INTEGERS)
    column = first + tl.arange(0, GROUPS * SIZE)
    held = (row < count)[:, None] & (column < width)[None, :]
    q = tl.reshape(q, [ROWS, GROUPS * SIZE]).to(values.dtype.element_ty)
    tl.store(values + row[:, None] * width + column[None, :], q, mask=held)
    groups = tl.cdiv(width, SIZE)
    group = first // SIZE + tl.arange(0, GROUPS)
    at = row[:, None] * groups + group[None, :]
    tl.store(scales + at, tl.reshape(scale, [ROWS, GROUPS]), mask=(row < count)[:, None] & (group < groups)[None, :])


@triton.jit(do_not_specialize=["count"])
def _quantize_rows(
    values,  # [T, inputs] int8 or float8, contiguous
    scales,  # [T, inputs / size] float32
    x,  # [T, inputs], rows x_stride apart
    count,  # groups of all rows
    groups,  # of a row
    x_stride,
    size,
    LARGEST: tl.constexpr,
    INTEGERS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,  # the next power of two
):
    group = (tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)).to(tl.int64)
    place = tl.arange(0, SIZE)
    held = (group < count)[:, None] & (place < size)[None, :]
    start = group // groups * x_stride + group % groups * size
    v = tl.load(x + start[:, None] + place[None, :], mask=held, other=0.0).to(tl.float32)
    q, scale = round_groups(v, LARGEST, INTEGERS)
    tl.store(scales + group, scale, mask=group < count)
    at = group[:, None] * size + place[None, :]
    tl.store(values + at, q.to(values.dtype.element_ty), mask=held)


def quantize_rows(x: torch.Tensor, rounding: Rounding) -> Rounded:
    """x: [T, K]."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, inputs = x.shape
    rounded = empty_rounded(rows, inputs, x, rounding)
    if not x.numel():
        return rounded
    size, groups = rounding.group_size, rounded.scales.shape[1]
    padded = triton.next_power_of_2(size)
    at_once = 1 if groups == 1 else max(1, TILE // padded)
    _quantize_rows[(triton.cdiv(rows * groups, at_once),)](
        rounded.values,
        rounded.scales,
        x,
        rows * groups,
        groups,
        x.stride(0),
        size,
        LARGEST=LARGEST[rounding.dtype],
        INTEGERS=rounding.dtype == torch.int8,
        GROUPS=at_once,
        SIZE=padded,
        num_warps=next(warps for longest, warps in WARPS if padded <= longest),
        enable_fp_fusion=False,
    )
    return rounded


def empty_rounded(rows: int, width: int, like: torch.Tensor, rounding: Rounding) -> Rounded:
    """To be filled; the rows were, or would be, of the dtype of `like`."""
    values = torch.empty(rows, width, dtype=rounding.dtype, device=like.device)
    scales = torch.empty(rows, width // rounding.group_size, device=like.device)
    return Rounded(values, scales, like.dtype)


def size_in_tile(rounding: Rounding, width: int, tile: int) -> int | None:
    """The SIZE of `store_rounded` for tiles of `tile` columns out of `width`. None: groups do not fit into them."""
    size = rounding.group_size
    if size == width and tile >= width:
        return tile
    return size if size <= tile and size & (size - 1) == 0 else None

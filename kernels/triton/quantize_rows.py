"""Activations rounded to 8 bits, one scale per row and group of inputs: what matmuls of 8-bit weights multiply with.

int8: to the nearest of 127 steps, ties to even, as `octavo.kernels.ref.linear` does. float8 e4m3: the largest magnitude
of a group becomes 448.
"""

import torch
import triton
import triton.language as tl

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
TILE = 4096  # numbers of a program, where a group has fewer
# (longest group, warps)
WARPS = ((4096, 4), (16384, 8), (1 << 30, 16))


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
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,  # the next power of two
):
    group = (tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)).to(tl.int64)
    place = tl.arange(0, SIZE)
    held = (group < count)[:, None] & (place < size)[None, :]
    start = group // groups * x_stride + group % groups * size
    v = tl.load(x + start[:, None] + place[None, :], mask=held, other=0.0).to(tl.float32)
    top = tl.max(tl.abs(v), axis=1)
    broken = tl.sum(v * 0.0, axis=1)  # NaN where v is not finite, else 0
    inverse = LARGEST / top
    rounds = inverse < float("inf")  # not if all is 0, or as good as 0
    scale = tl.where(broken == 0.0, tl.where(rounds, top / LARGEST, 0.0), float("nan"))
    tl.store(scales + group, scale, mask=group < count)
    q = v * tl.where(rounds & (broken == 0.0), inverse, 0.0)[:, None]
    q = tl.where(broken[:, None] == 0.0, q, 0.0)
    if values.dtype.element_ty == tl.int8:
        q = (q + 12582912.0) - 12582912.0  # 1.5 × 2^23: beyond it there are no fractions
    else:
        q = tl.minimum(tl.maximum(q, -LARGEST), LARGEST)
    at = group[:, None] * size + place[None, :]
    tl.store(values + at, q.to(values.dtype.element_ty), mask=held)


def quantize_rows(x: torch.Tensor, group_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, K] → values [T, K] of dtype, int8 or float8_e4m3fn, and scales [T, K / group_size] float32.

    A group that is not finite has the scale NaN.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, inputs = x.shape
    groups = inputs // group_size
    values = torch.empty(rows, inputs, dtype=dtype, device=x.device)
    scales = torch.empty(rows, groups, device=x.device)
    if not values.numel():
        return values, scales
    padded = triton.next_power_of_2(group_size)
    at_once = max(1, TILE // padded)
    if groups == 1:
        at_once = 1
    _quantize_rows[(triton.cdiv(rows * groups, at_once),)](
        values,
        scales,
        x,
        rows * groups,
        groups,
        x.stride(0),
        group_size,
        LARGEST=LARGEST[dtype],
        GROUPS=at_once,
        SIZE=padded,
        num_warps=next(warps for longest, warps in WARPS if padded <= longest),
        enable_fp_fusion=False,  # a product that is rounded before it is rounded to a step, as in `ref`
    )
    return values, scales

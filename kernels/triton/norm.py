"""Root mean square norms, one program per few rows. Shapes and contracts: `octavo.kernels.ops`.

A row that is rounded to 8 bits is the very row that it would be otherwise: squares are added in float64, since a
compiler lays a tile out, and so adds, by what is stored in the end.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from octavo.kernels.rounded import Rounded, Rounding
from octavo.kernels.triton.quantize_rows import LARGEST, empty_rounded, quantize_rows, size_in_tile, store_rounded
from octavo.kernels.triton.rows import rows_of

# Elements of a program's tile: rows shorter than this share a program.
TILE = 2048
# (longest row, warps)
WARPS = ((2048, 4), (8192, 8), (1 << 30, 16))


@triton.jit
def inverse_rms(value, eps, width: tl.constexpr):
    """value: [ROWS, WIDTH] float32 → [ROWS] float32."""
    squares = tl.sum((value * value).to(tl.float64), axis=1).to(tl.float32)
    return 1.0 / tl.sqrt(squares / width + eps)


@triton.jit
def store_norms(
    out,  # [count, width], rows out_stride apart; contiguous where rounded
    scales,  # [count, width / SIZE], if SIZE
    result,  # [ROWS, WIDTH] of the type that it has where it is not rounded
    row,
    column,
    count,
    out_stride,
    width: tl.constexpr,
    SIZE: tl.constexpr,  # of the groups in which it is rounded; 0 = it is not
    LARGEST: tl.constexpr,
    INTEGERS: tl.constexpr,
):
    if SIZE:
        store_rounded(out, scales, result.to(tl.float32), row, 0, count, width, SIZE, LARGEST, INTEGERS)
    else:
        held = (row < count)[:, None] & (column < width)[None, :]
        tl.store(out + row[:, None] * out_stride + column[None, :], result, mask=held)


@triton.jit(do_not_specialize=["count"])
def _rms_norm(
    out,  # [count, width], contiguous
    scales,
    x,  # row r at r // inner * x_outer + r % inner * x_inner
    weight,  # [width]
    count,
    inner,
    x_outer,
    x_inner,
    eps,
    width: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,  # the next power of two
    SIZE: tl.constexpr,
    LARGEST: tl.constexpr,
    INTEGERS: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, WIDTH)
    held = (row < count)[:, None] & (column < width)[None, :]
    start = row // inner * x_outer + row % inner * x_inner
    value = tl.load(x + start[:, None] + column[None, :], mask=held, other=0.0).to(tl.float32)
    scale = inverse_rms(value, eps, width)
    weights = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    result = (value * scale[:, None] * weights[None, :]).to(x.dtype.element_ty)
    store_norms(out, scales, result, row, column, count, width, width, SIZE, LARGEST, INTEGERS)


@triton.jit(do_not_specialize=["count"])
def _add_rms_norm(
    out,  # [count, width]: x itself, unless rounded
    scales,
    x,  # [count, width]
    residual,  # [count, width]: becomes the sum
    weight,  # [width]
    count,
    x_stride,
    residual_stride,
    eps,
    width: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    LARGEST: tl.constexpr,
    INTEGERS: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, WIDTH)
    held = (row < count)[:, None] & (column < width)[None, :]
    added = x + row[:, None] * x_stride + column[None, :]
    kept = residual + row[:, None] * residual_stride + column[None, :]
    total = tl.load(added, mask=held, other=0.0).to(tl.float32) + tl.load(kept, mask=held, other=0.0).to(tl.float32)
    total = total.to(x.dtype.element_ty)  # the norm is of what the next layer will read
    tl.store(kept, total, mask=held)
    value = total.to(tl.float32)
    scale = inverse_rms(value, eps, width)
    weights = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    result = (value * scale[:, None] * weights[None, :]).to(x.dtype.element_ty)
    store_norms(out, scales, result, row, column, count, x_stride, width, SIZE, LARGEST, INTEGERS)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, rounding: Rounding | None = None
) -> torch.Tensor | Rounded:
    width, padded, at_once, warps = tile_of(x.shape[-1])
    size = 0 if rounding is None else size_in_tile(rounding, width, padded)
    if size is None:
        return quantize_rows(rms_norm(x, weight, eps), rounding)
    out, target, scales, form = results_of(x, rounding, size)
    if x.numel() == 0:
        return out
    rows = rows_of(x)
    _rms_norm[(triton.cdiv(rows.count, at_once),)](
        target,
        scales,
        rows.x,
        weight,
        rows.count,
        rows.inner,
        rows.outer_stride,
        rows.inner_stride,
        eps,
        width,
        ROWS=at_once,
        WIDTH=padded,
        **form,
        num_warps=warps,
        enable_fp_fusion=False,
    )
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, rounding: Rounding | None = None
) -> tuple[torch.Tensor | Rounded, torch.Tensor]:
    """In place where the last dimension is contiguous and there are two."""
    shape, (width, padded, at_once, warps) = x.shape, tile_of(x.shape[-1])
    size = 0 if rounding is None else size_in_tile(rounding, width, padded)
    if size is None:
        norm, total = add_rms_norm(x, residual, weight, eps)
        return quantize_rows(norm, rounding), total
    x, residual = (part if _plain(part) else part.contiguous().view(-1, width) for part in (x, residual))
    out, target, scales, form = (x.view(shape), x, None, PLAIN) if rounding is None else results_of(x, rounding, size)
    if x.numel() == 0:
        return out, residual.view(shape)
    _add_rms_norm[(triton.cdiv(len(x), at_once),)](
        target,
        scales,
        x,
        residual,
        weight,
        len(x),
        x.stride(0),
        residual.stride(0),
        eps,
        width,
        ROWS=at_once,
        WIDTH=padded,
        **form,
        num_warps=warps,
        enable_fp_fusion=False,
    )
    return out, residual.view(shape)


PLAIN = {"SIZE": 0, "LARGEST": 0.0, "INTEGERS": False}


def results_of(
    x: torch.Tensor, rounding: Rounding | None, size: int
) -> tuple[torch.Tensor | Rounded, torch.Tensor, torch.Tensor | None, dict[str, float]]:
    """(what the op returns, its memory, its scales' memory, what the kernel is compiled for)."""
    if rounding is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        return out, out, None, PLAIN
    rounded = empty_rounded(*x.shape, x, rounding)
    integers = rounding.dtype == torch.int8
    form = {"SIZE": size, "LARGEST": LARGEST[rounding.dtype], "INTEGERS": integers}
    return rounded, rounded.values, rounded.scales, form


def _plain(x: torch.Tensor) -> bool:
    return x.dim() == 2 and x.stride(1) == 1


@cache
def tile_of(width: int) -> tuple[int, int, int, int]:
    """(width, padded width, rows per program, warps)."""
    padded = triton.next_power_of_2(width)
    warps = next(warps for longest, warps in WARPS if padded <= longest)
    return width, padded, max(1, TILE // padded), warps

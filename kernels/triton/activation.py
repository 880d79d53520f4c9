"""Activations, elementwise over rows. Shapes and contracts: `octavo.kernels.ops`.

Rows that are rounded with one scale each are computed by one program each, all others in tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo.kernels.rounded import Rounded, Rounding
from octavo.kernels.triton.quantize_rows import LARGEST, empty_rounded, quantize_rows, size_in_tile, store_rounded

TILE = 1024  # elements of a row that a program computes
WARPS = 4
# (longest row that is rounded whole, warps); longer ones do not fit into registers
WHOLE_ROWS = ((4096, 4), (8192, 8), (32768, 16))


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _gelu_tanh(x):
    """(1 + tanh u) / 2 is the logistic function of 2u."""
    return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@triton.jit
def _activate(
    out,  # [T, width], contiguous
    scales,  # [T, width / SIZE] float32, if SIZE
    x,  # [T, width] or, gated, [T, 2 * width] = (gate, up); rows x_stride apart
    x_stride,
    width,
    GELU: tl.constexpr,
    GATED: tl.constexpr,
    TILE: tl.constexpr,
    SIZE: tl.constexpr,  # of the groups in which the result is rounded to 8 bits; 0 = it is not
    LARGEST: tl.constexpr,
    INTEGERS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * TILE
    column = first + tl.arange(0, TILE)
    held = column < width
    value = tl.load(x + row * x_stride + column, mask=held, other=0.0).to(tl.float32)
    value = _gelu_tanh(value) if GELU else _silu(value)
    if GATED:
        value *= tl.load(x + row * x_stride + width + column, mask=held, other=0.0).to(tl.float32)
    value = value.to(x.dtype.element_ty)
    if SIZE:
        rows, v = row + tl.arange(0, 1), value.to(tl.float32)[None, :]
        store_rounded(out, scales, v, rows, first, tl.num_programs(0), width, SIZE, LARGEST, INTEGERS)
    else:
        tl.store(out + row * width + column, value, mask=held)


def silu_and_mul(x: torch.Tensor, rounding: Rounding | None = None) -> torch.Tensor | Rounded:
    return _gated(x, rounding, GELU=False)


def gelu_tanh_and_mul(x: torch.Tensor, rounding: Rounding | None = None) -> torch.Tensor | Rounded:
    return _gated(x, rounding, GELU=True)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return _plain(x, x.shape[1], GELU=True, GATED=False)


def _gated(x: torch.Tensor, rounding: Rounding | None, GELU: bool) -> torch.Tensor | Rounded:
    width = x.shape[1] // 2
    if rounding is None:
        return _plain(x, width, GELU, GATED=True)
    tile, warps = TILE, WARPS
    if rounding.group_size == width:
        tile = triton.next_power_of_2(width)
        warps = next((warps for longest, warps in WHOLE_ROWS if tile <= longest), 0)
    size = size_in_tile(rounding, width, tile)
    if size is None or not warps:
        return quantize_rows(_plain(x, width, GELU, GATED=True), rounding)
    x = x if x.stride(1) == 1 else x.contiguous()
    out = empty_rounded(len(x), width, x, rounding)
    if x.numel():
        _activate[(len(x), triton.cdiv(width, tile))](
            out.values,
            out.scales,
            x,
            x.stride(0),
            width,
            GELU=GELU,
            GATED=True,
            TILE=tile,
            SIZE=size,
            LARGEST=LARGEST[rounding.dtype],
            INTEGERS=rounding.dtype == torch.int8,
            num_warps=warps,
            enable_fp_fusion=False,
        )
    return out


def _plain(x: torch.Tensor, width: int, GELU: bool, GATED: bool) -> torch.Tensor:
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty((len(x), width), dtype=x.dtype, device=x.device)
    if out.numel():
        _activate[(len(x), triton.cdiv(width, TILE))](
            out,
            None,
            x,
            x.stride(0),
            width,
            GELU=GELU,
            GATED=GATED,
            TILE=TILE,
            SIZE=0,
            LARGEST=0.0,
            INTEGERS=False,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    return out

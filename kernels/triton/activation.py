"""Activations, elementwise over rows. Shapes and contracts: `octavo.kernels.ops`."""

from typing import Any

import torch
import triton
import triton.language as tl

TILE = 1024  # elements of a row that a program computes
WARPS = 4


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
    x,  # [T, width] or, gated, [T, 2 * width] = (gate, up); rows x_stride apart
    x_stride,
    width,
    GELU: tl.constexpr,
    GATED: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    held = column < width
    value = tl.load(x + row * x_stride + column, mask=held, other=0.0).to(tl.float32)
    value = _gelu_tanh(value) if GELU else _silu(value)
    if GATED:
        value *= tl.load(x + row * x_stride + width + column, mask=held, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, value.to(out.dtype.element_ty), mask=held)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    return _launch(x, x.shape[1] // 2, GELU=False, GATED=True)


def gelu_tanh_and_mul(x: torch.Tensor) -> torch.Tensor:
    return _launch(x, x.shape[1] // 2, GELU=True, GATED=True)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return _launch(x, x.shape[1], GELU=True, GATED=False)


def _launch(x: torch.Tensor, width: int, **kind: Any) -> torch.Tensor:
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty((len(x), width), dtype=x.dtype, device=x.device)
    if out.numel():
        _activate[(len(x), triton.cdiv(width, TILE))](out, x, x.stride(0), width, **kind, TILE=TILE, num_warps=WARPS)
    return out

"""Products of few rows, cut along the inputs too, so that all processors read weights: tiles, parts and their sum.

Knows shapes and the device's number of processors. The parts of an output are added in order: the same bits every time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from octavo.kernels.triton.tiles import MatmulTile, matmul_tile, processors

TILE = 1024  # outputs that a program adds up
FEWEST_STEPS = 4  # of a part


@dataclass(frozen=True, slots=True)
class Cut:
    """A grid over rows × outputs × parts of the inputs. steps: of each part."""

    tile: MatmulTile
    grid: tuple[int, int, int]
    steps: int

    @property
    def parts(self) -> int:
        return self.grid[2]


@lru_cache(1 << 14)
def cut(kernel: str, rows: int, outputs: int, steps: int, device: torch.device) -> Cut:
    """kernel: a name in tiles.MATMUL. steps: how often a program would add to its sums."""
    tile = matmul_tile(kernel, rows, device)
    # Programs of the same outputs follow one another: their weights are read from memory once.
    grid = triton.cdiv(rows, tile.rows), triton.cdiv(outputs, tile.outputs)
    parts = max(1, min(tile.programs * processors(device) // (grid[0] * grid[1]), steps // FEWEST_STEPS))
    each = triton.cdiv(steps, parts)
    return Cut(tile, (*grid, triton.cdiv(steps, each)), each)


@triton.jit(do_not_specialize=["rows"])
def _add_parts(
    out,  # [rows, outputs]
    parts,  # [PARTS, rows, outputs] float32
    bias,  # [outputs]
    rows,
    outputs,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    output = tl.program_id(1) * TILE + tl.arange(0, TILE)
    held = output < outputs
    total = tl.zeros([TILE], tl.float32)
    for part in range(PARTS):
        total += tl.load(parts + (part * rows + row) * outputs + output, mask=held, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + output, mask=held, other=0.0).to(tl.float32)
    tl.store(out + row * outputs + output, total.to(out.dtype.element_ty), mask=held)


def add_parts(parts: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """parts [P, T, N] float32, bias [N] → their sum [T, N] in dtype."""
    count, rows, outputs = parts.shape
    out = torch.empty(rows, outputs, dtype=dtype, device=parts.device)
    has_bias = bias is not None
    _add_parts[(rows, triton.cdiv(outputs, TILE))](
        out, parts, bias if has_bias else out, rows, outputs, PARTS=count, HAS_BIAS=has_bias, TILE=TILE, num_warps=4
    )
    return out

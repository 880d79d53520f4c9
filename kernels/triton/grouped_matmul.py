"""Products of experts: rows sorted by expert, each multiplied with its own expert's weight.

Where an expert's rows begin is known to the device alone. The grid is for the most tiles that any such split can need;
every program finds its expert among the tiles of all, and those beyond the last tile end at once. Definition:
`octavo.kernels.ref.experts`.
"""

import torch
import triton
import triton.language as tl

from octavo.kernels.triton.tiles import matmul_tile

STEP = 64  # inputs


@triton.jit
def _grouped_matmul(
    out,  # [rows, outputs]
    x,  # [rows, inputs], rows x_stride apart
    weights,  # [experts, outputs, inputs]
    offsets,  # [experts + 1] int32
    experts,
    outputs,
    inputs,
    x_stride,
    ALL: tl.constexpr,  # experts, to the next power of two
    WHOLE_STEPS: tl.constexpr,  # they fill the inputs
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STEP: tl.constexpr,
):
    tile = tl.program_id(0)
    each = tl.arange(0, ALL)
    starts = tl.load(offsets + each, mask=each < experts, other=0)
    counts = tl.load(offsets + each + 1, mask=each < experts, other=0) - starts
    tiles = tl.where(each < experts, tl.cdiv(counts, ROWS), 0)
    ends = tl.cumsum(tiles)
    expert = tl.sum((ends <= tile).to(tl.int32))
    if expert < experts:
        within = tile - tl.sum(tl.where(each < expert, tiles, 0))
        last = tl.load(offsets + expert + 1)
        row = tl.load(offsets + expert) + within * ROWS + tl.arange(0, ROWS)
        output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
        place = tl.arange(0, STEP)
        there, here = (output < outputs)[:, None], (row < last)[None, :]
        start = expert.to(tl.int64) * outputs * inputs
        weight_at = weights + start + output.to(tl.int64)[:, None] * inputs + place[None, :]
        x_at = x + row.to(tl.int64)[None, :] * x_stride + place[:, None]
        sums = tl.zeros([OUTPUTS, ROWS], tl.float32)
        for first in range(0, inputs, STEP):
            if WHOLE_STEPS:
                a = tl.load(weight_at + first, mask=there, other=0.0)
                b = tl.load(x_at + first, mask=here, other=0.0)
            else:
                a = tl.load(weight_at + first, mask=there & (first + place < inputs)[None, :], other=0.0)
                b = tl.load(x_at + first, mask=here & (first + place < inputs)[:, None], other=0.0)
            sums = tl.dot(a, b, sums, input_precision="ieee")
        at = row.to(tl.int64)[None, :] * outputs + output[:, None]
        tl.store(out + at, sums.to(out.dtype.element_ty), mask=there & here)


def grouped_linear(x: torch.Tensor, weights: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """x [T, K], weights [E, N, K] contiguous and of x's dtype, offsets [E + 1] int32 on the device → [T, N]."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, (experts, outputs, inputs) = len(x), weights.shape
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    tile = matmul_tile("grouped", triton.cdiv(rows, experts), x.device)
    # Each expert that has rows may have one tile that is not full.
    most = rows // tile.rows + min(rows, experts)
    _grouped_matmul[(most, triton.cdiv(outputs, tile.outputs))](
        out,
        x,
        weights,
        offsets,
        experts,
        outputs,
        inputs,
        x.stride(0),
        ALL=triton.next_power_of_2(experts),
        WHOLE_STEPS=inputs % STEP == 0,
        ROWS=tile.rows,
        OUTPUTS=tile.outputs,
        STEP=STEP,
        num_warps=tile.warps,
        num_stages=tile.stages_of((tile.rows + tile.outputs) * STEP * x.itemsize, x.device),
    )
    return out

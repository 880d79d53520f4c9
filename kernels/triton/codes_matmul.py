"""Products of rows with weights of 4- or 8-bit codes, which become numbers in registers: what AWQ, GPTQ and GGUF store.

x is taken as it is. A step is of inputs of one group, so that its product is of the small whole numbers code - zero,
exact in any type of x, and is scaled once, in float32. Weights are the left operand, as in `scaled_matmul`, which may
come from registers. Contract: `octavo.kernels.ops.Linear`; layout: `pack`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo.kernels.triton.splits import add_parts, cut


@triton.jit
def _numbers(codes, ZERO: tl.constexpr, dtype: tl.constexpr):
    """code - zero. The bits of 2^23 + code are those of 2^23 with the code below: no slow conversion is needed."""
    shifted = (codes.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True)
    return (shifted - (8388608.0 + ZERO)).to(dtype)


@triton.jit(do_not_specialize=["rows", "all_steps", "steps"])
def _codes_matmul(
    out,  # [parts, rows, outputs]
    x,  # [rows, inputs], rows x_stride apart
    codes,  # [outputs / PANEL, all_steps, PANEL, STEP] uint8
    scales,  # [groups, outputs]
    mins,  # [groups, outputs]
    bias,  # [outputs]
    rows,
    outputs,
    x_stride,
    all_steps,
    steps,  # of a part
    ZERO: tl.constexpr,
    FOUR_BITS: tl.constexpr,
    STEPS_PER_GROUP: tl.constexpr,
    HAS_MINS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    PANEL: tl.constexpr,
    STEP: tl.constexpr,  # bytes along the inputs
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    part = tl.program_id(2)
    place = tl.arange(0, STEP)
    there, here = output < outputs, (row < rows)[None, :]
    tile = (output // PANEL).to(tl.int64) * all_steps + part * steps
    codes_at = codes + (tile * PANEL + output % PANEL)[:, None] * STEP + place[None, :]
    x_at = x + row.to(tl.int64)[None, :] * x_stride + place[:, None]

    sums = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for step in range(part * steps, tl.minimum((part + 1) * steps, all_steps)):
        stored = tl.load(codes_at, mask=there[:, None], other=0)
        codes_at += PANEL * STEP
        if FOUR_BITS:
            low = tl.load(x_at + step * 2 * STEP, mask=here, other=0.0)
            high = tl.load(x_at + step * 2 * STEP + STEP, mask=here, other=0.0)
            product = tl.dot(_numbers(stored & 15, ZERO, low.dtype), low, input_precision="ieee")
            product = tl.dot(_numbers(stored >> 4, ZERO, low.dtype), high, product, input_precision="ieee")
        else:
            low = tl.load(x_at + step * STEP, mask=here, other=0.0)
            product = tl.dot(_numbers(stored, ZERO, low.dtype), low, input_precision="ieee")
        at = step // STEPS_PER_GROUP * outputs + output
        sums += product * tl.load(scales + at, mask=there, other=0.0).to(tl.float32)[:, None]
        if HAS_MINS:
            total = tl.sum(low.to(tl.float32), axis=0)
            if FOUR_BITS:
                total += tl.sum(high.to(tl.float32), axis=0)
            sums += tl.load(mins + at, mask=there, other=0.0).to(tl.float32)[:, None] * total[None, :]

    if HAS_BIAS:
        sums += tl.load(bias + output, mask=there, other=0.0).to(tl.float32)[:, None]
    at = (part * rows + row).to(tl.int64)[None, :] * outputs + output[:, None]
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=there[:, None] & here)


def codes_matmul(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    mins: torch.Tensor | None,
    zero: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """x [T, K] @ weight [N, K]ᵀ + bias [N] → [T, N] in x's dtype.

    codes: as `pack.Codes` says, in steps of a power of two inputs, at least 16 (of 4 bits, 32), that divides K / G.
    scales, mins: [G, N] float16 or float32.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    (rows, inputs), (groups, outputs) = x.shape, scales.shape
    step = inputs // codes.shape[1]
    four_bits = codes.shape[3] != step
    part = cut("codes", rows, outputs, inputs // step, x.device)
    step_bytes = part.tile.rows * step * x.itemsize + part.tile.outputs * codes.shape[3]
    whole = part.parts == 1
    out = torch.empty(part.parts, rows, outputs, dtype=x.dtype if whole else torch.float32, device=x.device)
    has_bias = whole and bias is not None
    _codes_matmul[part.grid](
        out,
        x,
        codes,
        scales,
        scales if mins is None else mins,
        bias if has_bias else out,
        rows,
        outputs,
        x.stride(0),
        inputs // step,
        part.steps,
        ZERO=zero,
        FOUR_BITS=four_bits,
        STEPS_PER_GROUP=inputs // groups // step,
        HAS_MINS=mins is not None,
        HAS_BIAS=has_bias,
        ROWS=part.tile.rows,
        OUTPUTS=part.tile.outputs,
        PANEL=codes.shape[2],
        STEP=codes.shape[3],
        num_warps=part.tile.warps,
        num_stages=part.tile.stages_of(step_bytes, x.device),
    )
    return out[0] if whole else add_parts(out, bias, x.dtype)

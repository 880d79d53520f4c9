"""Products of 8-bit rows with 8-bit weights: float8 e4m3 or int8, summed by the tensor cores and scaled as they go.

One scale per row and output for all inputs, or per group of inputs; then the product of a group is scaled before it is
added. Weights are the left operand, [outputs, inputs] @ [inputs, rows]: the tensor cores take at least 64 rows of that
one and as few as 8 columns of the other, so that few rows of x waste nothing. Contract: `octavo.kernels.ops.Linear`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo.kernels.triton.splits import add_parts, cut

STEP = 128  # inputs per step, where groups do not ask for fewer


@triton.jit(do_not_specialize=["rows", "steps"])
def _scaled_matmul(
    out,  # [parts, rows, outputs]
    x,  # [rows, inputs] float8 or int8
    weight,  # [outputs, inputs] of the same
    x_scales,  # [rows, groups] float32
    weight_scales,  # [outputs / SHARED, groups] float32
    bias,  # [outputs]
    rows,
    outputs,
    inputs,
    groups,
    steps,  # of a part
    STEPS_PER_GROUP: tl.constexpr,  # 0 = one group
    SHARED: tl.constexpr,  # outputs that share their scales
    HAS_BIAS: tl.constexpr,
    WHOLE_STEPS: tl.constexpr,  # they fill the inputs
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STEP: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    part = tl.program_id(2)
    place = tl.arange(0, STEP)
    there, here = (output < outputs)[:, None], (row < rows)[None, :]
    weight_at = weight + output.to(tl.int64)[:, None] * inputs + place[None, :]
    x_at = x + row.to(tl.int64)[None, :] * inputs + place[:, None]
    summed_in = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    scale_at = output // SHARED * groups

    sums = tl.zeros([OUTPUTS, ROWS], tl.float32 if STEPS_PER_GROUP else summed_in)
    for step in range(part * steps, tl.minimum((part + 1) * steps, tl.cdiv(inputs, STEP))):
        first = step * STEP
        if WHOLE_STEPS:
            a = tl.load(weight_at + first, mask=there, other=0.0)
            b = tl.load(x_at + first, mask=here, other=0.0)
        else:
            a = tl.load(weight_at + first, mask=there & (first + place < inputs)[None, :], other=0.0)
            b = tl.load(x_at + first, mask=here & (first + place < inputs)[:, None], other=0.0)
        if STEPS_PER_GROUP:
            group = step // STEPS_PER_GROUP
            scale = tl.load(weight_scales + scale_at + group, mask=output < outputs, other=0.0)
            x_scale = tl.load(x_scales + row * groups + group, mask=row < rows, other=0.0)
            sums += tl.dot(a, b, out_dtype=summed_in).to(tl.float32) * scale[:, None] * x_scale[None, :]
        else:
            # Hopper's sums of float8 products have few bits until they are added to float32.
            sums = tl.dot(a, b, sums, out_dtype=summed_in, max_num_imprecise_acc=STEP)

    result = sums.to(tl.float32)
    if not STEPS_PER_GROUP:
        x_scale = tl.load(x_scales + row, mask=row < rows, other=0.0)
        result *= tl.load(weight_scales + scale_at, mask=output < outputs, other=0.0)[:, None] * x_scale[None, :]
    if HAS_BIAS:
        result += tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)[:, None]
    at = (part * rows + row).to(tl.int64)[None, :] * outputs + output[:, None]
    tl.store(out + at, result.to(out.dtype.element_ty), mask=there & here)


def scaled_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scales: torch.Tensor,
    weight_scales: torch.Tensor,
    group_size: int,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(x * x_scales) [T, K] @ (weight * weight_scales) [N, K]ᵀ + bias [N] → [T, N] in dtype.

    x, weight: float8_e4m3fn or int8, contiguous. x_scales: [T, G] float32. weight_scales: [N, G], or [N / 128, G] where
    128 outputs share theirs, float32. group_size: K / G; K itself, or whole 32s.
    """
    (rows, inputs), outputs, groups = x.shape, len(weight), x_scales.shape[1]
    step = STEP if groups == 1 else next(step for step in (128, 64, 32) if group_size % step == 0)
    part = cut("scaled", rows, outputs, triton.cdiv(inputs, step), x.device)
    stages = part.tile.stages_of((part.tile.rows + part.tile.outputs) * step, x.device)
    whole = part.parts == 1
    out = torch.empty(part.parts, rows, outputs, dtype=dtype if whole else torch.float32, device=x.device)
    has_bias = whole and bias is not None
    _scaled_matmul[part.grid](
        out,
        x,
        weight,
        x_scales,
        weight_scales,
        bias if has_bias else out,
        rows,
        outputs,
        inputs,
        groups,
        part.steps,
        STEPS_PER_GROUP=0 if groups == 1 else group_size // step,
        SHARED=1 if len(weight_scales) == outputs else 128,
        HAS_BIAS=has_bias,
        WHOLE_STEPS=inputs % step == 0,
        ROWS=part.tile.rows,
        OUTPUTS=part.tile.outputs,
        STEP=step,
        num_warps=part.tile.warps,
        num_stages=stages,
    )
    return out[0] if whole else add_parts(out, bias, dtype)

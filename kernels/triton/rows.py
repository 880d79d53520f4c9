"""Where the rows of a tensor are, for ops that treat every row alike. Knows shapes and strides; launches nothing."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Rows:
    """A tensor [..., M] as rows: row r begins at r // inner * outer_stride + r % inner * inner_stride.

    x: the tensor, its last dimension contiguous (copied if it was not so before).
    """

    x: torch.Tensor
    count: int
    inner: int
    outer_stride: int
    inner_stride: int


def rows_of(x: torch.Tensor) -> Rows:
    """A slice of a fused projection, [T, M] or [T, H, D], is taken as it lies."""
    if x.stride(-1) != 1 or x.dim() > 3:
        x = x.contiguous().flatten(0, -2)
    count = x.numel() // x.shape[-1]
    if x.dim() == 1:
        return Rows(x, count, 1, 0, 0)
    if x.dim() == 2:
        return Rows(x, count, 1, x.stride(0), 0)
    return Rows(x, count, x.shape[1], x.stride(0), x.stride(1))

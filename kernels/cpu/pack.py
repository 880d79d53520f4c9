"""Lays a Matrix out for linear.h: panels of 32 outputs along K, with a group's scales before its codes.

    [panel][input][32]                             float32
    [panel][input / 2][32][2]                      bfloat16
    [panel][group]{scales[32], minima[32], …}      then, per group, [input / 4][32][4] float8 or 8-bit codes, or
                                                   [input / 4][16][4] bytes: output o below, o + 16 above

Outputs and inputs that fill up a panel or a step are zeros. Knows the layout alone; who multiplies is linear.h.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.kernels.matrix import Matrix

PANEL = 32
FORMS = {torch.float32: 0, torch.bfloat16: 1, torch.float8_e4m3fn: 2}
CODES = {8: 3, 4: 4}


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight whose outputs are those of its sections, one after the other: each in a number format of its own."""

    sections: tuple[Section, ...]

    @property
    def outputs(self) -> int:
        return sum(section.outputs for section in self.sections)

    @property
    def inputs(self) -> int:
        return self.sections[0].inputs

    @property
    def nbytes(self) -> int:
        return sum(section.data.nbytes for section in self.sections)


@dataclass(frozen=True, slots=True)
class Section:
    """A Matrix [outputs, inputs] as linear.h reads it. data: uint8. group_size: with its padding.

    order: [inputs] int64, the input that comes to each place; None = as they are.
    """

    data: Tensor
    outputs: int
    inputs: int
    form: int
    groups: int = 0
    group_size: int = 0
    scales_half: bool = False
    has_mins: bool = False
    zero: int = 0
    order: Tensor | None = None

    @property
    def layout(self) -> tuple[int, ...]:
        """The fields of linear.h's Linear from `form` to `zero`."""
        return self.form, self.group_size, self.groups, self.scales_half, self.has_mins, self.zero


def pack(matrix: Matrix) -> Section:
    """A copy in the native layout. float16 numbers become float32."""
    values = (matrix.values.float() if matrix.values.dtype == torch.float16 else matrix.values).contiguous()
    outputs, inputs = values.shape
    if matrix.scales is None:
        step = 2 if values.dtype == torch.bfloat16 else 1
        panels = _panels(_padded(values, 2), step)
        return Section(_bytes(panels), outputs, inputs, FORMS[values.dtype])
    groups = matrix.scales.shape[1]
    size = -(-matrix.group_size // 4) * 4
    assert size == matrix.group_size or groups == 1, "groups are whole steps of 4 inputs"
    if matrix.values.dtype == torch.float8_e4m3fn:
        form, codes = FORMS[torch.float8_e4m3fn], _panels(_padded(values.view(torch.uint8), 4), 4)
    else:
        form, codes = CODES[matrix.bits], _panels(_padded(values, 4, matrix.zero), 4)
    codes = codes.unflatten(1, (groups, -1))  # [panels, groups, size / 4, 32, 4]
    if form == CODES[4]:
        codes = codes[..., :16, :] | (codes[..., 16:, :] << 4)
    heads = [_scale_panels(part) for part in (matrix.scales, matrix.mins) if part is not None]
    return Section(
        torch.cat([*heads, codes.flatten(2)], dim=2).flatten(),
        outputs,
        inputs,
        form,
        groups,
        size,
        matrix.scales.dtype == torch.float16,
        matrix.mins is not None,
        matrix.zero,
        matrix.inputs,
    )


def _padded(values: Tensor, step: int, fill: int = 0) -> Tensor:
    """[N, K] filled up to whole panels and steps."""
    outputs, inputs = values.shape
    more = (-(-outputs // PANEL) * PANEL - outputs, -(-inputs // step) * step - inputs)
    return values if more == (0, 0) else torch.nn.functional.pad(values, (0, more[1], 0, more[0]), value=fill)


def _panels(values: Tensor, step: int) -> Tensor:
    """[N, K] → [N / 32, K / step, 32, step]."""
    return values.view(-1, PANEL, values.shape[1] // step, step).transpose(1, 2).contiguous()


def _scale_panels(scales: Tensor) -> Tensor:
    """[N, G] → [N / 32, G, bytes]."""
    return (
        _padded(scales.contiguous(), 1).view(-1, PANEL, scales.shape[1]).transpose(1, 2).contiguous().view(torch.uint8)
    )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8).flatten()

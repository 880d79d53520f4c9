"""Lays a Matrix out for linear.h: panels of 32 outputs along K, with a group's scales before its codes.

    [panel][input][32]                             float32
    [panel][input / 2][32][2]                      bfloat16
    [panel][group]{scales[32], minima[32], …}      then, per group, [input / 4][32][4] float8 or 8-bit codes, or
                                                   [input / 4][16][4] bytes: output o below, o + 16 above

Outputs and inputs that fill up a panel or a step are zeros. Knows the layout alone; who multiplies is linear.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.kernels.matrix import Matrix, join

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


def pack(matrices: Sequence[Matrix]) -> Section:
    """A copy in the native layout, the outputs of all one after the other. They have one `form`. float16 numbers become
    float32.

    Every matrix is written to its place panel by panel, so that memory beyond the result's stays in the CPU's cache.
    """
    if any(matrix.shape[0] % PANEL for matrix in matrices[:-1]):
        matrices = [join(matrices)]
    first, outputs = matrices[0], sum(matrix.shape[0] for matrix in matrices)
    inputs, panels = first.shape[1], [-(-matrix.shape[0] // PANEL) for matrix in matrices]
    if first.scales is None:
        numbers = [_numbers(matrix.values) for matrix in matrices]
        words = numbers[0].shape[1] * numbers[0].itemsize // 4
        data = torch.empty(sum(panels), words, PANEL, dtype=torch.int32)
        for values, out in zip(numbers, data.split(panels), strict=True):
            for place, panel in zip(out, _words(values), strict=True):
                place.copy_(panel.t())
        return Section(_bytes(data), outputs, inputs, FORMS[numbers[0].dtype])
    groups = first.scales.shape[1]
    size = -(-first.group_size // 4) * 4
    assert size == first.group_size or groups == 1, "groups are whole steps of 4 inputs"
    float8 = first.values.dtype == torch.float8_e4m3fn
    form = FORMS[torch.float8_e4m3fn] if float8 else CODES[first.bits]
    heads = (1 if first.mins is None else 2) * PANEL * first.scales.itemsize
    data = torch.empty(sum(panels), groups, heads + size * PANEL * first.bits // 8, dtype=torch.uint8)
    for matrix, out in zip(matrices, data.split(panels), strict=True):
        _write_codes(matrix, out, heads, form == CODES[4])
    return Section(
        _bytes(data),
        outputs,
        inputs,
        form,
        groups,
        size,
        first.scales.dtype == torch.float16,
        first.mins is not None,
        first.zero,
        first.inputs,
    )


def _write_codes(matrix: Matrix, out: Tensor, heads: int, four_bits: bool) -> None:
    """out: [panels, groups, bytes] uint8. heads: bytes of a group before its codes."""
    assert matrix.scales is not None
    parts = [_scale_panels(part) for part in (matrix.scales, matrix.mins) if part is not None]
    out[:, :, :heads] = torch.cat(parts, dim=2)
    codes = out[:, :, heads:]
    float8 = matrix.values.dtype == torch.float8_e4m3fn
    values = _padded(matrix.values.contiguous().view(torch.uint8), 4, 0 if float8 else matrix.zero)
    turned = torch.empty(values.shape[1] // 4, PANEL, dtype=torch.int32)
    bytes_ = turned.view(torch.uint8).view(out.shape[1], -1, PANEL, 4)  # [groups, steps, 32, 4]
    for place, panel in zip(codes, _words(values), strict=True):
        turned.copy_(panel.t())
        if four_bits:
            low, high = bytes_[:, :, : PANEL // 2], bytes_[:, :, PANEL // 2 :]
            place.copy_((high << 4).bitwise_or_(low).flatten(1))
        else:
            place.copy_(bytes_.flatten(1))


def _numbers(values: Tensor) -> Tensor:
    """[N, K] filled up to whole panels and pairs."""
    values = values.float() if values.dtype == torch.float16 else values
    return _padded(values.contiguous(), 2)


def _words(values: Tensor) -> Tensor:
    """[N, K], whole panels and words → [N / 32, 32, words] int32."""
    return values.view(torch.int32).view(len(values) // PANEL, PANEL, -1)


def _padded(values: Tensor, step: int, fill: int = 0) -> Tensor:
    """[N, K] filled up to whole panels and steps."""
    outputs, inputs = values.shape
    more = (-(-outputs // PANEL) * PANEL - outputs, -(-inputs // step) * step - inputs)
    return values if more == (0, 0) else torch.nn.functional.pad(values, (0, more[1], 0, more[0]), value=fill)


def _scale_panels(scales: Tensor) -> Tensor:
    """[N, G] → [N / 32, G, bytes]."""
    return (
        _padded(scales.contiguous(), 1).view(-1, PANEL, scales.shape[1]).transpose(1, 2).contiguous().view(torch.uint8)
    )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8).flatten()

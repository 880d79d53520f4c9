"""How a Matrix lies in the device's memory, by what multiplies with it.

    Numbers    floats: torch's own matmul. Also formats whose groups no kernel takes: they become bfloat16.
    Scaled8    float8 e4m3, or 8-bit codes around 128 as int8: scaled_matmul, x rounded to the same 8 bits.
    Codes      other codes: codes_matmul, x as it is. In panels, of which a program reads one stream of memory.

Knows the layout alone; who multiplies is `linear`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from octavo.kernels.matrix import Matrix

SHARED = 128  # outputs of a block of float8 e4m3 weights that has one scale
STEPS = (128, 64, 32, 16)  # inputs
PANEL = 64  # outputs


@dataclass(frozen=True, slots=True)
class Numbers:
    """values: [N, K] of any float type of two bytes or four."""

    values: Tensor

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Outputs ids [T] as numbers: [T, K]."""
        return self.values[ids].to(dtype)


@dataclass(frozen=True, slots=True)
class Scaled8:
    """values: [N, K] float8_e4m3fn or int8. scales: [N, G] float32, or [N / 128, G] where 128 outputs share theirs.

    order: [K] int64, the input that comes to each place; None = as they are.
    """

    values: Tensor
    scales: Tensor
    order: Tensor | None

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    @property
    def group_size(self) -> int:
        return self.values.shape[1] // self.scales.shape[1]

    def numbers(self, ids: Tensor) -> Tensor:
        """Outputs ids [T] as numbers, in the order of places: [T, K] float32."""
        shared = 1 if len(self.scales) == len(self.values) else SHARED
        values = self.values.view(torch.uint8)[ids].view(self.values.dtype).float()
        return (values.unflatten(1, (-1, self.group_size)) * self.scales[ids // shared].unsqueeze(2)).flatten(1)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return _in_order(self.numbers(ids), self.order).to(dtype)


@dataclass(frozen=True, slots=True)
class Codes:
    """w[k, n] = scales[k // group_size, n] * (code - zero) + mins[k // group_size, n].

    codes: [N / PANEL, K / step, PANEL, step] uint8, outputs filled up with codes of 0; of 4 bits
    [N / PANEL, K / step, PANEL, step / 2]: the first half of a step's inputs below, the second above.
    scales, mins: [G, N] float16 or float32. order: as Scaled8's.
    """

    codes: Tensor
    scales: Tensor
    mins: Tensor | None
    zero: int
    bits: int
    order: Tensor | None

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.codes, self.scales, self.mins) if part is not None)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        codes = self.codes[ids // PANEL, :, ids % PANEL]  # [T, steps, bytes]
        if self.bits == 4:
            codes = torch.cat((codes & 15, codes >> 4), dim=2)
        numbers = (codes.flatten(1).float() - self.zero).unflatten(1, (len(self.scales), -1))
        numbers *= self.scales[:, ids].t().float().unsqueeze(2)
        if self.mins is not None:
            numbers += self.mins[:, ids].t().float().unsqueeze(2)
        return _in_order(numbers.flatten(1), self.order).to(dtype)


Section = Numbers | Scaled8 | Codes


def pack(matrix: Matrix) -> Section:
    """A copy, on the matrix's device."""
    if matrix.scales is None:
        return Numbers(matrix.values.clone(memory_format=torch.contiguous_format))
    groups, size = matrix.scales.shape[1], matrix.group_size
    if matrix.values.dtype == torch.float8_e4m3fn and (groups == 1 or size % 32 == 0):
        return Scaled8(matrix.values.clone(), _shared(matrix.scales.float()), matrix.inputs)
    around_128 = matrix.bits == 8 and matrix.zero == 128 and matrix.mins is None
    if matrix.values.dtype == torch.uint8 and around_128 and (groups == 1 or size % 32 == 0):
        return Scaled8((matrix.values ^ 128).view(torch.int8), matrix.scales.float().contiguous(), matrix.inputs)
    if matrix.values.dtype == torch.uint8:
        matrix = _joined(matrix)
    least = 32 if matrix.bits == 4 else 16
    step = next((step for step in STEPS if step >= least and matrix.group_size % step == 0), None)
    if matrix.values.dtype != torch.uint8 or step is None:
        return Numbers(matrix.dequantize(torch.bfloat16))
    codes = torch.nn.functional.pad(matrix.values, (0, 0, 0, -len(matrix.values) % PANEL))
    codes = codes.view(len(codes) // PANEL, PANEL, -1, step).transpose(1, 2)
    if matrix.bits == 4:
        codes = codes[..., : step // 2] | codes[..., step // 2 :] << 4
    scales, mins = (None if part is None else part.t().contiguous() for part in (matrix.scales, matrix.mins))
    assert scales is not None
    return Codes(codes.contiguous(), scales, mins, matrix.zero, matrix.bits, matrix.inputs)


def _joined(matrix: Matrix) -> Matrix:
    """Neighbouring groups of the same scales and minima become one, up to a step: x is not rounded group by group here,
    for which they may have been parted.
    """
    parts = {name: part for name in ("scales", "mins") if (part := getattr(matrix, name)) is not None}
    while matrix.group_size < STEPS[0] and not matrix.scales.shape[1] % 2:
        if not all(torch.equal(part[:, ::2], part[:, 1::2]) for part in parts.values()):
            break
        parts = {name: part[:, ::2] for name, part in parts.items()}
        matrix = replace(matrix, group_size=2 * matrix.group_size, **parts)
    return matrix


def _shared(scales: Tensor) -> Tensor:
    """scales [N, G], or [N / 128, G] if all of every 128 outputs are the same; the last may be fewer."""
    firsts = scales[::SHARED]
    if len(scales) > SHARED and torch.equal(firsts.repeat_interleave(SHARED, dim=0)[: len(scales)], scales):
        return firsts.contiguous()
    return scales.contiguous()


def _in_order(numbers: Tensor, order: Tensor | None) -> Tensor:
    """numbers [T, K] as places have them → as inputs do."""
    return numbers if order is None else torch.empty_like(numbers).index_copy_(1, order, numbers)

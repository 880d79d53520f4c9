"""Matrix: a weight as its number format states it, before a body of the ops lays it out for its machine.

Knows tensors alone: no files, no formats by name, no layers. Every format octavo reads becomes one of these, so that an
op that multiplies with a Matrix multiplies with all of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

_CHUNK_WEIGHTS = 1 << 20
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight [N, K]: N outputs, K inputs.

        w[n, k] = scales[n, k // group_size] * (values[n, k] - zero) + mins[n, k // group_size]

    values: [N, K]; uint8 codes below 2^bits, or numbers: float8_e4m3fn (bits 8), or one of FLOATS (bits 0; then there
    are no scales). scales, mins: [N, K / group_size] float16 or float32, both of one dtype; None = 1 and 0.
    zero: of codes alone; the same for the whole matrix. group_size: divides K; K itself = one scale per output.
    inputs: [K] int64, the input each column of `values` belongs to, where a format has reordered them; None = its own.
    """

    values: torch.Tensor
    bits: int = 0
    group_size: int = 0
    scales: torch.Tensor | None = None
    mins: torch.Tensor | None = None
    zero: int = 0
    inputs: torch.Tensor | None = None

    def __post_init__(self) -> None:
        codes, numbers = self.values.dtype == torch.uint8, self.values.dtype in FLOATS
        assert self.values.dim() == 2
        assert codes or numbers or self.values.dtype == torch.float8_e4m3fn
        assert self.bits in ((4, 8) if codes else (0,) if numbers else (8,))
        assert numbers == (self.scales is None), "codes have scales, numbers do not"
        assert self.inputs is None or not numbers
        if self.scales is not None:
            assert self.group_size > 0
            assert self.values.shape[1] % self.group_size == 0, "groups must fill the inputs"
            assert self.scales.shape == (self.values.shape[0], self.values.shape[1] // self.group_size)
            assert self.scales.dtype in (torch.float16, torch.float32)
        if self.mins is not None:
            assert self.scales is not None
            assert (self.mins.shape, self.mins.dtype) == (self.scales.shape, self.scales.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    @property
    def nbytes(self) -> int:
        """Of values (4 bits are counted as such), scales and mins."""
        bits = self.values.numel() * (4 if self.bits == 4 else 8 * self.values.element_size())
        return bits // 8 + sum(part.nbytes for part in (self.scales, self.mins) if part is not None)

    @property
    def form(self) -> tuple[object, ...]:
        """What two matrices must share to be joined."""
        return (
            self.values.dtype,
            self.bits,
            self.values.shape[1] // self.group_size if self.group_size else 0,
            None if self.scales is None else self.scales.dtype,
            self.mins is None,
            self.zero,
            None if self.inputs is None else tuple(self.inputs.tolist()),
        )

    def narrow(self, axis: int, start: int, size: int) -> Matrix:
        """Outputs (axis 0) or inputs (axis 1) from `start` on.

        Where inputs cut through a group, all groups become as small as the cut asks for. Inputs that a format has
        reordered come out as numbers, in their own order. Raises ValueError where groups would not be whole fours.
        """
        if axis == 0 or self.scales is None:
            return self._each(lambda part: part.narrow(axis, start, size))
        if (start, size) == (0, self.shape[1]):
            return self
        if self.inputs is not None:  # each group keeps another number of inputs, which no group_size could state
            return Matrix(torch.cat([rows[:, start : start + size] for rows in self._numbers()]))
        if self.group_size == self.shape[1]:  # one scale per output holds for any part of its inputs
            return replace(self, values=self.values.narrow(1, start, size), group_size=size)
        step = math.gcd(self.group_size, start, size)
        if step % 4 and step != size:
            raise ValueError(
                f"cannot be cut at inputs {start} to {start + size}: its groups of {self.group_size} would come in "
                f"parts of {step}, which must be whole fours"
            )
        whole = self._in_groups_of(step)
        parts = {name: getattr(whole, name) for name in ("scales", "mins")}
        cut = {name: part.narrow(1, start // step, size // step) for name, part in parts.items() if part is not None}
        return replace(whole, values=self.values.narrow(1, start, size), **cut)

    def to(self, device: torch.device) -> Matrix:
        """The matrix itself if it is there already."""
        if self.values.device == device:
            return self
        moved = self._each(lambda part: part.to(device))
        return moved if self.inputs is None else replace(moved, inputs=self.inputs.to(device))

    def permute_outputs(self, index: torch.Tensor) -> Matrix:
        """index: [N] int64, which output comes to each place."""
        return self._each(lambda part: part[index])

    def split_groups(self, most: int) -> Matrix:
        """The same numbers in groups of at most `most` inputs, if such groups of whole fours fit into the present ones.

        Activations are rounded group by group, so smaller groups lose less of them.
        """
        sizes = (size for size in range(most // 4 * 4, 0, -4) if self.group_size % size == 0)
        size = self.group_size if self.group_size <= most else next(sizes, self.group_size)
        return self if self.scales is None else self._in_groups_of(size)

    def _in_groups_of(self, size: int) -> Matrix:
        """size: divides the present group_size."""
        if size == self.group_size:
            return self
        times = self.group_size // size
        parts = {name: getattr(self, name) for name in ("scales", "mins") if getattr(self, name) is not None}
        repeated = {name: part.repeat_interleave(times, dim=1) for name, part in parts.items()}
        return replace(self, group_size=size, **repeated)

    def zeros(self, outputs: int) -> Matrix:
        """A matrix of the same form with so many outputs that are zero."""
        first = self.narrow(0, 0, 1)
        parts = {"values": self.zero, "scales": 0, "mins": 0}
        made = {
            name: torch.full_like(part, fill).expand(outputs, -1)
            for name, fill in parts.items()
            if (part := getattr(first, name)) is not None
        }
        return replace(self, **made)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[N, K], computed in float32: the definition of the format."""
        if self.scales is None:
            return self.values.to(dtype)  # such matrices are never reordered
        values = (self.values.float() - self.zero).unflatten(1, (-1, self.group_size))
        values *= self.scales.float().unsqueeze(2)
        if self.mins is not None:
            values += self.mins.float().unsqueeze(2)
        values = values.flatten(1)
        if self.inputs is not None:
            values = torch.empty_like(values).index_copy_(1, self.inputs, values)
        return values.to(dtype)

    def _numbers(self) -> Iterator[torch.Tensor]:
        """`dequantize`, some outputs at a time."""
        step = max(1, _CHUNK_WEIGHTS // self.shape[1])
        for start in range(0, self.shape[0], step):
            yield self.narrow(0, start, min(step, self.shape[0] - start)).dequantize()

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Matrix:
        parts = {name: getattr(self, name) for name in ("values", "scales", "mins")}
        return replace(self, **{name: change(part) for name, part in parts.items() if part is not None})


def alike(matrices: Sequence[Matrix]) -> list[list[Matrix]]:
    """Neighbours of the same `form` together."""
    return [list(neighbours) for _, neighbours in itertools.groupby(matrices, key=lambda matrix: matrix.form)]


def join(matrices: Sequence[Matrix]) -> Matrix:
    """The outputs of all, one after the other. All must have the same `form`."""
    first = matrices[0]
    assert all(matrix.form == first.form for matrix in matrices)
    if len(matrices) == 1:
        return first
    parts = {
        name: torch.cat([getattr(matrix, name) for matrix in matrices])
        for name in ("values", "scales", "mins")
        if getattr(first, name) is not None
    }
    return replace(first, **parts)

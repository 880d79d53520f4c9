"""A quantized module that is still in its checkpoint: narrowed first, read after, so that a rank reads what it keeps.

Knows along which axes the tensors of each format hold outputs and inputs, and how many of them an entry stands for.
What the numbers mean is in the formats' own files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from octavo.engine.layers.weight import read
from octavo.engine.loader.file_tensor import Arrival, Expected, FileTensor, InFile
from octavo.engine.quant.scheme import AWQ, GPTQ, Floats, Ints, Packed, WeightFormat
from octavo.kernels.matrix import Matrix

Piece = torch.Tensor | FileTensor | Expected
Pieces = Mapping[str, Piece]

_ON_HOST = frozenset({"g_idx", "weight_g_idx"})  # what is asked of them is answered there


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a piece: an entry stands for `each` outputs (of 0) or inputs (of 1); 0 = for all of them."""

    of: int
    each: int


Axes = Mapping[str, tuple[Axis, Axis]]


def axes(form: WeightFormat) -> Axes:
    """Of every piece but weight_shape."""
    outputs, inputs = Axis(0, 1), Axis(1, 1)
    match form:
        case GPTQ():
            word, group = 32 // form.bits, Axis(1, form.group_size)
            return {
                "qweight": (Axis(1, word), outputs),
                "qzeros": (group, Axis(0, word)),
                "scales": (group, outputs),
                "g_idx": (inputs, outputs),
            }
        case AWQ():
            group = Axis(1, form.group_size)
            return {"qweight": (inputs, Axis(0, 8)), "qzeros": (group, Axis(0, 8)), "scales": (group, outputs)}
        case Packed():
            word, group = 32 // form.bits, Axis(1, form.group_size)
            return {
                "weight_packed": (outputs, Axis(1, word)),
                "weight_scale": (outputs, group),
                "weight_zero_point": (Axis(0, word), group),
                "weight_g_idx": (inputs, outputs),
            }
        case Ints():
            group = Axis(1, form.group_size)
            scales = (outputs, group)
            return {"weight": (outputs, inputs), "weight_scale": scales, "weight_zero_point": scales}
        case Floats():
            rows, columns = form.block or (1, 0)
            return {"weight": (outputs, inputs), "weight_scale": (Axis(0, rows), Axis(1, columns))}


@dataclass(frozen=True, slots=True)
class StoredModule:
    """See `octavo.engine.layers.weight.Stored`. make: a Matrix of a format's pieces; it raises ValueError.

    kept: the outputs and the inputs that are wanted.
    """

    form: WeightFormat
    pieces: Pieces
    make: Callable[[Mapping[str, torch.Tensor]], Matrix]
    whole: tuple[int, int]
    kept: tuple[range, range]

    @classmethod
    def of(
        cls, form: WeightFormat, pieces: Pieces, make: Callable[[Mapping[str, torch.Tensor]], Matrix]
    ) -> StoredModule:
        whole = _shape(form, pieces)
        return cls(form, pieces, make, whole, (range(whole[0]), range(whole[1])))

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.kept[0]), len(self.kept[1])

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces.values())

    def narrow(self, axis: int, start: int, size: int) -> StoredModule:
        kept = list(self.kept)
        kept[axis] = kept[axis][start : start + size]
        return replace(self, kept=(kept[0], kept[1]))

    def read(self) -> Matrix:
        """On the device where its largest piece is. Raises ValueError if the pieces do not fit together."""
        taken = self._taken()
        cut = {name: read(piece) for name, piece in self._pieces(taken).items()}
        device = max(cut.values(), key=lambda piece: piece.nbytes).device
        cut = {name: piece if name in _ON_HOST else piece.to(device) for name, piece in cut.items()}
        if "weight_shape" in self.pieces:
            cut["weight_shape"] = torch.tensor([len(part) for part in taken])
        matrix = self.make(cut)
        for axis in (0, 1):
            if len(self.kept[axis]) != len(taken[axis]):
                matrix = matrix.narrow(axis, self.kept[axis].start - taken[axis].start, len(self.kept[axis]))
        return matrix

    def slices(self) -> Iterator[FileTensor]:
        """See `octavo.engine.loader.file_tensor.InFile`."""
        cut = self._pieces(self._taken()).values()
        return (file for piece in cut if isinstance(piece, InFile) for file in piece.slices())

    def expecting(self, arrivals: Mapping[FileTensor, Arrival]) -> StoredModule:
        pieces = {
            name: piece.expecting(arrivals) if isinstance(piece, FileTensor) else piece
            for name, piece in self.pieces.items()
        }
        return replace(self, pieces=pieces)

    def _taken(self) -> list[range]:
        """Outputs and inputs to read."""
        known = axes(self.form)
        return [self._covering(axis, known) for axis in (0, 1)]

    def _pieces(self, taken: list[range]) -> dict[str, Piece]:
        """All but weight_shape, cut to them."""
        known = axes(self.form)
        return {name: self._cut(piece, known[name], taken) for name, piece in self.pieces.items() if name in known}

    def _covering(self, axis: int, known: Axes) -> range:
        """The least that is wanted, and no entry of any piece is cut."""
        kept, whole = self.kept[axis], self.whole[axis]
        if axis == 1 and not _ON_HOST.isdisjoint(self.pieces):
            return range(whole)  # inputs that belong to a group may be anywhere
        each = [place.each for name in self.pieces if name in known for place in known[name] if place.of == axis]
        step = math.lcm(*(size for size in each if size))
        return range(kept.start // step * step, min(whole, -(-kept.stop // step) * step))

    def _cut(self, piece: Piece, places: tuple[Axis, Axis], taken: list[range]) -> Piece:
        for axis, place in zip(range(len(piece.shape)), places, strict=False):
            mine = taken[place.of]
            # An axis of another length says the same of all, or is wrong, which the format itself finds out.
            if place.each and piece.shape[axis] == -(-self.whole[place.of] // place.each):
                first, last = mine.start // place.each, -(-mine.stop // place.each)
                piece = piece.narrow(axis, first, last - first)
        return piece


def _shape(form: WeightFormat, pieces: Pieces) -> tuple[int, int]:
    """(outputs, inputs)."""
    match form:
        case GPTQ():
            words, outputs = pieces["qweight"].shape
            return outputs, words * 32 // form.bits
        case AWQ():
            inputs, words = pieces["qweight"].shape
            return words * 8, inputs
        case Packed():
            outputs, inputs = pieces["weight_shape"].tolist()
            return outputs, inputs
        case Ints() | Floats():
            outputs, inputs = pieces["weight"].shape
            return outputs, inputs

"""Tensors that are still in their file: which bytes they are, and slices of them.

Knows bytes, shapes and files. When and by which thread they are read is `read_ahead`'s affair; what they mean is not
known here.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from octavo.engine.errors import ConfigError
from octavo.engine.layers.weight import Source


class Arrival(Protocol):
    """A slice of a tensor that somebody is reading."""

    def wait(self) -> torch.Tensor:
        """The slice. Raises ConfigError naming the file if it cannot be read."""
        ...


@runtime_checkable
class InFile(Protocol):
    """A `octavo.engine.layers.weight.Stored` that can be read ahead."""

    def slices(self) -> Iterator[FileTensor]:
        """What `read` would read."""
        ...

    def expecting(self, arrivals: Mapping[FileTensor, Arrival]) -> Source:
        """The same, which takes those slices from there."""
        ...


# Bytes between two pieces that are worth a read of their own; fewer are read along.
WORTH_SKIPPING = 64 << 10


class OpenFile:
    """A file of weights, open for reading by several threads. Closed with the last tensor that is in it.

    Raises ConfigError naming it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise self._cannot(error) from error
        weakref.finalize(self, os.close, self._descriptor)

    def read_into(self, start: int, buffer: memoryview) -> None:
        """The bytes from `start` on, as many as the buffer holds. The GIL is free meanwhile."""
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._descriptor, [buffer[done:]], start + done)
            except OSError as error:
                raise self._cannot(error) from error
            if not count:
                raise ConfigError(f"Cannot read weights from {self.path}: it has become shorter since it was opened.")
            done += count

    @cached_property
    def mapped(self) -> torch.Tensor:
        """[bytes] uint8. The mapping is private and lives as long as a tensor that views it."""
        try:
            return torch.frombuffer(mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)
        except (OSError, ValueError) as error:
            raise self._cannot(error) from error

    def _cannot(self, error: Exception) -> ConfigError:
        return ConfigError(f"Cannot read weights from {self.path}: {getattr(error, 'strerror', None) or error}.")


@dataclass(frozen=True, slots=True)
class Run:
    """`count` pieces of `size` bytes each, the first at byte `start` of a file, each `pitch` after the one before."""

    start: int
    count: int
    pitch: int
    size: int

    @property
    def nbytes(self) -> int:
        return self.count * self.size

    @property
    def span(self) -> int:
        """Bytes from the start of the first piece to the end of the last."""
        return (self.count - 1) * self.pitch + self.size

    @property
    def is_read_along(self) -> bool:
        """Whether what lies between the pieces is read with them."""
        return self.pitch - self.size < WORTH_SKIPPING

    def pieces(self) -> Iterator[Run]:
        return (Run(self.start + i * self.pitch, 1, self.size, self.size) for i in range(self.count))

    def split(self, most: int) -> Iterator[Run]:
        """Parts of at most `most` bytes, in order."""
        if self.count > 1 and self.size <= most:
            step = most // self.size
            for i in range(0, self.count, step):
                yield replace(self, start=self.start + i * self.pitch, count=min(step, self.count - i))
            return
        for piece in self.pieces():
            for at in range(0, piece.size, most):
                size = min(most, piece.size - at)
                yield Run(piece.start + at, 1, size, size)

    def read(self, file: OpenFile, out: torch.Tensor, scratch: torch.Tensor) -> None:
        """The pieces, one after the other, into out [nbytes] uint8. scratch: [any] uint8, for what is read along."""
        if self.count == 1:
            file.read_into(self.start, memoryview(out.numpy()))
        elif self.is_read_along and self.span <= len(scratch):
            file.read_into(self.start, memoryview(scratch[: self.span].numpy()))
            out.view(self.count, self.size).copy_(scratch.as_strided((self.count, self.size), (self.pitch, 1)))
        else:
            # As many at a time as the scratch holds with what lies between, at least one.
            together = max(1, len(scratch) // self.pitch) if self.is_read_along else 1
            for part, mine in zip(self.split(together * self.size), out.split(together * self.size), strict=True):
                part.read(file, mine, scratch)

    def touch(self, file: OpenFile, scratch: torch.Tensor) -> None:
        """As `read`, but keeps nothing: afterwards the system has it in memory."""
        whole = [Run(self.start, 1, self.span, self.span)] if self.is_read_along else self.pieces()
        for run in whole:
            for part in run.split(len(scratch)):
                file.read_into(part.start, memoryview(scratch[: part.size].numpy()))


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A slice of a tensor as a file has it, row by row. See `octavo.engine.layers.weight.Stored`.

    whole: shape in the file. offset: its first byte. kept: what is wanted along each axis of it. turned: the two axes
    are then swapped.
    """

    file: OpenFile
    dtype: torch.dtype
    whole: tuple[int, ...]
    offset: int
    kept: tuple[range, ...]
    turned: bool = False

    @classmethod
    def of(cls, file: OpenFile, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> FileTensor:
        return cls(file, dtype, shape, offset, tuple(range(size) for size in shape))

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of the slice, as it lies in the file."""
        return tuple(len(kept) for kept in self.kept)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored_shape[::-1] if self.turned else self.stored_shape

    @property
    def nbytes(self) -> int:
        """Of the whole."""
        return math.prod(self.whole) * self.dtype.itemsize

    @property
    def kept_nbytes(self) -> int:
        return math.prod(self.stored_shape) * self.dtype.itemsize

    def narrow(self, axis: int, start: int, size: int) -> FileTensor:
        at = len(self.kept) - 1 - axis if self.turned else axis
        kept = list(self.kept)
        kept[at] = kept[at][start : start + size]
        return replace(self, kept=tuple(kept))

    def t(self) -> FileTensor:
        assert len(self.whole) == 2
        return replace(self, turned=not self.turned)

    def runs(self) -> Iterator[Run]:
        """The slice's bytes in the order of its elements."""
        strides = [math.prod(self.whole[axis + 1 :]) * self.dtype.itemsize for axis in range(len(self.whole))]
        cut = [axis for axis, size in enumerate(self.whole) if len(self.kept[axis]) != size]
        axis = cut[-1] if cut else 0  # from here on everything lies together
        if not math.prod(self.stored_shape):
            return
        if not self.whole:
            yield Run(self.offset, 1, self.dtype.itemsize, self.dtype.itemsize)
            return
        size = len(self.kept[axis]) * strides[axis]
        start = self.offset + self.kept[axis].start * strides[axis]
        if axis == 0:
            yield Run(start, 1, size, size)
            return
        rows = self.kept[axis - 1]
        for place in itertools.product(*self.kept[: axis - 1]):
            first = (*place, rows.start)
            at = start + sum(i * stride for i, stride in zip(first, strides, strict=False))
            yield Run(at, len(rows), strides[axis - 1], size)

    def read(self) -> torch.Tensor:
        """A view of the mapped file: read when it is used. Do not write into it."""
        raw = self.file.mapped[self.offset : self.offset + self.nbytes]
        # Nothing promises that a tensor begins where its numbers may.
        raw = raw if self.offset % self.dtype.itemsize == 0 else raw.clone()
        tensor = raw.view(self.dtype).view(self.whole)
        for axis, kept in enumerate(self.kept):
            if len(kept) != self.whole[axis]:
                tensor = tensor.narrow(axis, kept.start, len(kept))
        return tensor.t() if self.turned else tensor

    def load(self) -> torch.Tensor:
        """Read now, into memory of its own. Raises ConfigError."""
        raw = torch.empty(self.kept_nbytes, dtype=torch.uint8)
        for run, out in zip(runs := list(self.runs()), raw.split([run.nbytes for run in runs]), strict=True):
            run.read(self.file, out, raw[:0])
        return self.of_bytes(raw)

    def of_bytes(self, raw: torch.Tensor) -> torch.Tensor:
        """raw: [kept_nbytes] uint8, the bytes of `runs` → the slice."""
        tensor = raw.view(self.dtype).view(self.stored_shape)
        return tensor.t() if self.turned else tensor

    def slices(self) -> Iterator[FileTensor]:
        yield self

    def expecting(self, arrivals: Mapping[FileTensor, Arrival]) -> Expected:
        return Expected(self, arrivals)


@dataclass(frozen=True, slots=True)
class Expected:
    """A FileTensor, slices of which somebody is reading. See `octavo.engine.layers.weight.Stored`."""

    tensor: FileTensor
    arrivals: Mapping[FileTensor, Arrival]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def narrow(self, axis: int, start: int, size: int) -> Expected:
        return Expected(self.tensor.narrow(axis, start, size), self.arrivals)

    def t(self) -> Expected:
        return Expected(self.tensor.t(), self.arrivals)

    def read(self) -> torch.Tensor:
        """A slice that nobody is reading is read now. Raises ConfigError naming the file if it cannot be."""
        arrival = self.arrivals.get(self.tensor)
        return self.tensor.read() if arrival is None else arrival.wait()

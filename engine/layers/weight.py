"""Parameters that know which slice of which checkpoint tensor they hold.

A layer decides once, when it is built, what its rank owns; whoever reads a checkpoint only says which tensor came.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from octavo.engine.errors import ConfigError
from octavo.kernels.matrix import Matrix


class Stored(Protocol):
    """A weight that is still in its checkpoint: so that a rank reads what it keeps of it, and nothing else."""

    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def nbytes(self) -> int:
        """Of the whole, as stored."""
        ...

    def narrow(self, axis: int, start: int, size: int) -> Stored:
        """Reads nothing."""
        ...

    def read(self) -> torch.Tensor | Matrix:
        """Raises ValueError if it cannot be cut there."""
        ...


Source = torch.Tensor | Matrix | Stored  # a tensor may be a view of a mapped file, which is read when it is used


def read(source: Source) -> torch.Tensor | Matrix:
    return source if isinstance(source, (torch.Tensor, Matrix)) else source.read()


def as_floats(weight: torch.Tensor | Matrix) -> torch.Tensor:
    return weight.dequantize() if isinstance(weight, Matrix) else weight


@dataclass(frozen=True, slots=True)
class Part:
    """One checkpoint tensor's place in a parameter, along the parameter's sharded axis.

    `whole` is the tensor's length in the checkpoint. This rank takes [source, source + size) of it and keeps it at
    [start, start + size) of the parameter.
    """

    name: str
    start: int
    size: int
    source: int
    whole: int


@dataclass(frozen=True, slots=True)
class ShardRule:
    """How a parameter is cut over ranks and put together from checkpoint tensors, which agree in all other axes.

    Parameter rows that no part covers are padding and stay zero.
    """

    axis: int
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Cut:
    """What each rank of a group has of `whole` things in a row, this one those of `share`. Ranks may share a thing."""

    shares: tuple[range, ...]
    rank: int
    whole: int

    @property
    def share(self) -> range:
        return self.shares[self.rank]

    def times(self, size: int) -> Cut:
        """Each thing is `size` long."""
        longer = tuple(range(share.start * size, share.stop * size) for share in self.shares)
        return Cut(longer, self.rank, self.whole * size)

    def part(self, name: str = "", start: int = 0) -> Part:
        return Part(name, start, len(self.share), self.share.start, self.whole)


def whole_part(total: int, name: str = "", start: int = 0) -> Part:
    """Every rank keeps all of it."""
    return Part(name, start, total, 0, total)


class Weight(nn.Parameter):
    """A parameter with its shard rule. Starts as zeros; never trained."""

    rule: ShardRule
    takes_whole = False  # its method reads all of a tensor, whatever it keeps

    def __new__(cls, shape: Sequence[int], rule: ShardRule, dtype: torch.dtype, device: torch.device) -> Weight:
        self = super().__new__(cls, torch.zeros(*shape, dtype=dtype, device=device), requires_grad=False)
        self.rule = rule
        return self

    def source_shape(self, part: str | None) -> tuple[int, ...]:
        """Shape of the checkpoint tensor of `part`, or of one that holds all parts in order (None)."""
        shape = list(self.shape)
        shape[self.rule.axis] = sum(p.whole for p in self.parts(part))
        return tuple(shape)

    def parts(self, part: str | None) -> tuple[Part, ...]:
        """The part of that name, or all (None)."""
        return tuple(p for p in self.rule.parts if part is None or p.name == part)

    def check(self, part: str | None, shape: Sequence[int]) -> None:
        """Raises ConfigError if a checkpoint tensor of that shape is not what `part` wants."""
        expected = self.source_shape(part)
        if tuple(shape) != expected:
            raise ConfigError(f"has shape {tuple(shape)}, the model's config asks for {expected}")

    def fill(self, part: str | None, tensor: Source) -> None:
        """Copy this rank's slice of a checkpoint tensor, cast to the parameter's dtype. Raises ConfigError on shape."""
        for p, mine in self.cut(part, tensor):
            self.data.narrow(self.rule.axis, p.start, p.size).copy_(as_floats(mine))

    def cut(self, part: str | None, source: Source) -> Iterator[tuple[Part, torch.Tensor | Matrix]]:
        """This rank's slice of every part that a checkpoint tensor holds; nothing else of it is read.

        Raises ConfigError on shape, ValueError where a quantized matrix cannot be cut.
        """
        for p, mine in self.slices(part, source):
            yield p, read(mine)

    def slices(self, part: str | None, source: Source) -> Iterator[tuple[Part, Source]]:
        """As `cut`, not read. Raises ConfigError on shape."""
        self.check(part, source.shape)
        at = 0
        for p in self.parts(part):
            yield p, source.narrow(self.rule.axis, at + p.source, p.size)
            at += p.whole

    def will_read(self, part: str | None, source: Source) -> list[Source]:
        """What loading it will read of a checkpoint tensor, which can be read ahead. Raises ConfigError on shape."""
        return [source] if self.takes_whole else [mine for _, mine in self.slices(part, source)]


class Layer(nn.Module):
    """A module that owns Weights. `load` is the one door through which checkpoint tensors reach them."""

    def expects(self) -> dict[str, Weight]:
        """Last name of each checkpoint tensor the layer must get → the Weight that states its parts and shape."""
        found = self.named_parameters(recurse=False)
        return {name: weight for name, weight in found if isinstance(weight, Weight)}

    def finish(self) -> None:
        """All tensors are loaded. Called once, before the first forward."""

    def load(self, name: str, part: str | None, tensor: Source) -> None:
        """Take the tensor `name`, of a part or (None) of all parts in order. Raises ConfigError on a wrong shape."""
        self.expects()[name].fill(part, tensor)

"""The rank layout of one replica, as an immutable value.

Layers receive a Mesh and ask its groups; nobody else does rank arithmetic. A group of size 1 is the identity, so a
laptop and a node of GPUs run one code path. How tensors travel is a Link's affair: octavo.engine.parallel.connect.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Protocol

import torch

from octavo.engine.errors import ConfigError
from octavo.engine.parallel.layout import deal_evenly
from octavo.kernels.rounded import Rounded, Rounding


class Link(Protocol):
    """Moves tensors between the ranks of one group. All ranks of the group make the same calls in the same order.

    Every call raises RankLost, naming the group, if it fails or takes too long; the link is of no use then.

    recordable: all_reduce and all_gather may be captured in a CUDA graph. fuses_norm: `sum_add_rms_norm` is of use.
    """

    recordable: bool
    fuses_norm: bool

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor: ...
    def all_gather(self, x: torch.Tensor) -> torch.Tensor: ...
    def send(self, x: torch.Tensor, to: int) -> None: ...
    def recv(self, out: torch.Tensor, source: int) -> None: ...
    def sum_add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, rounding: Rounding | None
    ) -> tuple[torch.Tensor | Rounded, torch.Tensor] | None: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that share one kind of split. `rank` is this process's place in it, 0 … size - 1."""

    name: str
    rank: int = 0
    size: int = 1
    link: Link | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ConfigError(f"Rank {self.rank} is outside of group {self.name} of size {self.size}.")

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the group, bit for bit the same on all ranks. x: any shape, given up. Size 1: x itself.

        On a CPU an element's sum is taken in rank order, whatever else is in x.
        """
        return x if self.size == 1 else self._link.all_reduce(x)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """x: [...], of one shape and dtype on all ranks → [size, ...], in rank order. Size 1: a view of x."""
        return x.unsqueeze(0) if self.size == 1 else self._link.all_gather(x)

    def sum_add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, rounding: Rounding | None
    ) -> tuple[torch.Tensor | Rounded, torch.Tensor] | None:
        """ops.add_rms_norm of all_reduce(x) in one launch, the same bits on all ranks; x, residual: [T, M], given up.
        None: not to be had, for these sizes or at all, on any rank, and nothing was done."""
        return self._link.sum_add_rms_norm(x, residual, weight, eps, rounding) if self.fuses_norm else None

    def gather_shares(self, x: torch.Tensor, shares: tuple[range, ...]) -> torch.Tensor:
        """x: [T, this rank's share] → [T, whole]: columns that lie dealt over the ranks, together again."""
        if self.size == 1:
            return x
        padded = x.new_zeros(len(x), max(len(share) for share in shares))
        padded[:, : x.shape[1]] = x
        everyone = self.all_gather(padded)
        return torch.cat([theirs[:, : len(share)] for share, theirs in zip(shares, everyone, strict=True)], dim=1)

    def send(self, x: torch.Tensor, to: int) -> None:
        """Send x to rank `to` of the group. x may be overwritten at once; the other side's pace is not waited for,
        unless it is several tensors behind."""
        self._link.send(x, to)

    def recv(self, out: torch.Tensor, source: int) -> None:
        """Fill `out` (contiguous) with the next tensor that `source` sends; shape and dtype must be the sender's."""
        self._link.recv(out, source)

    def shares(self, total: int, unit: int) -> tuple[range, ...]:
        """Every rank's part of `total` things that are best cut at multiples of `unit` (see `deal_evenly`)."""
        return deal_evenly(total, self.size, unit)

    @property
    def recordable(self) -> bool:
        """Whether a CUDA graph may hold the group's all_reduce and all_gather."""
        return self.size == 1 or self._link.recordable

    @property
    def fuses_norm(self) -> bool:
        """Whether sums may well be left to the norm that comes next: see `Unsummed`."""
        return self.link is not None and self.link.fuses_norm

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1

    @property
    def _link(self) -> Link:
        if self.link is None:
            raise ConfigError(f"Group {self.name} has size {self.size}, but no collective is connected to it.")
        return self.link


@dataclass(frozen=True, slots=True)
class Unsummed:
    """A rank's part of a sum over its group, left to be added up by the norm that comes next."""

    part: torch.Tensor
    group: Group

    def add_up(self) -> torch.Tensor:
        """The sum. Once: the part is given up."""
        return self.group.all_reduce(self.part)


@dataclass(frozen=True, slots=True)
class Mesh:
    """tensor (tp), pipeline (pp), data (dp) and expert (ep) groups of this rank. A rank of pp is a stage."""

    tp: Group = field(default_factory=lambda: Group("tp"))
    pp: Group = field(default_factory=lambda: Group("pp"))
    dp: Group = field(default_factory=lambda: Group("dp"))
    ep: Group = field(default_factory=lambda: Group("ep"))

    def close(self) -> None:
        """Cut all connections: whoever waits for this rank gets RankLost at once."""
        for each in fields(self):
            group: Group = getattr(self, each.name)
            if group.link is not None:
                group.link.close()

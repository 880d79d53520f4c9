"""The rank layout of one replica, as an immutable value.

Layers receive a Mesh and ask its groups; nobody else does rank arithmetic. A group of size 1 is the identity, so a
laptop and a node of GPUs run one code path.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from octavo.engine.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that share one kind of split. `rank` is this process's place in it, 0 … size - 1."""

    name: str
    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ConfigError(f"Rank {self.rank} is outside of group {self.name} of size {self.size}.")

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the group. x: any shape. Size 1: x itself."""
        if self.size == 1:
            return x
        raise ConfigError(f"Group {self.name} has size {self.size}, but no collective is connected to it.")

    def all_gather(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Concatenate the group's shards along `dim`, in rank order. Size 1: x itself."""
        if self.size == 1:
            return x
        raise ConfigError(f"Group {self.name} has size {self.size}, but no collective is connected to it.")

    def share(self, total: int, what: str) -> int:
        """This rank's part of `total` things, which must divide evenly."""
        if total % self.size:
            raise ConfigError(f"{what} ({total}) cannot be split over {self.size} {self.name} ranks.")
        return total // self.size


@dataclass(frozen=True, slots=True)
class Mesh:
    """tensor (tp), pipeline (pp), data (dp) and expert (ep) groups of this rank."""

    tp: Group = field(default_factory=lambda: Group("tp"))
    pp: Group = field(default_factory=lambda: Group("pp"))
    dp: Group = field(default_factory=lambda: Group("dp"))
    ep: Group = field(default_factory=lambda: Group("ep"))

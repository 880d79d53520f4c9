"""How the ranks of a replica are arranged, and how things are dealt to them. Imports no torch.

rank = stage * tp + tp_rank: the ranks of a stage are neighbours, so that those who talk most share a node.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from octavo.engine.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Layout:
    """tp: ranks that share each layer. pp: stages the layers are dealt to, in order."""

    tp: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        if self.tp < 1 or self.pp < 1:
            raise ConfigError(
                f"tensor_parallel_size and pipeline_parallel_size must be at least 1, got {self.tp} and {self.pp}."
            )

    @property
    def size(self) -> int:
        return self.tp * self.pp

    def place(self, rank: int) -> tuple[int, int]:
        """(stage, tp_rank) of a rank."""
        assert 0 <= rank < self.size, (rank, self)
        return divmod(rank, self.tp)

    def rank(self, stage: int, tp_rank: int) -> int:
        return stage * self.tp + tp_rank

    def layers(self, num_layers: int, stage: int) -> range:
        """The layers of a stage. Where they do not divide, earlier stages have one more: the last has the head too."""
        return deal(num_layers, self.pp)[stage]


def deal(total: int, shares: int, unit: int = 1) -> tuple[range, ...]:
    """0 … total - 1 dealt to `shares` owners: contiguous, each a multiple of `unit` (but for the last, which has what
    is left), differing by at most one unit, the larger ones first.
    """
    units = -(-total // unit)
    base, more = divmod(units, shares)
    edges = [min(total, unit * (i * base + min(i, more))) for i in range(shares + 1)]
    return tuple(range(a, b) for a, b in pairwise(edges))


def deal_evenly(total: int, shares: int, unit: int) -> tuple[range, ...]:
    """As `deal`, in the largest of unit, unit / 2, … 1 that leaves the shares about equal.

    For things that are best cut at multiples of `unit` (a power of two) but may be cut elsewhere.
    """
    while unit > 1 and total % (unit * shares) and total // unit < _FINE * shares:
        unit //= 2
    return deal(total, shares, unit)


_FINE = 4  # units per share from which one more or less does not matter

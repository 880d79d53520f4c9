"""Budget: a limit that a step's plan must fit in. A new constraint on a step is a new budget."""

from __future__ import annotations


class Budget:
    """`left` of `limit` units."""

    __slots__ = ("left", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.left = limit

    def fits(self, amount: int) -> bool:
        return amount <= self.left

    def take(self, amount: int) -> None:
        assert amount <= self.left, f"{amount} taken of {self.left}"
        self.left -= amount

    def give_back(self, amount: int) -> None:
        self.left += amount
        assert self.left <= self.limit, f"{amount} given back, {self.left} of {self.limit}"

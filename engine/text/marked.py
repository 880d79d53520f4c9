"""A text, or two, as tokens of which it is known where they come from: so that they can be cut without losing what the
tokenizer puts around them. No tokenizer here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Side = Literal["left", "right"]


@dataclass(frozen=True, slots=True)
class Marked:
    """Parallel lists. sources: which text a token is of, 0 or 1; None: put there by the tokenizer. types: token types,
    where a model tells texts apart by them, else 0."""

    ids: Sequence[int]
    sources: Sequence[int | None]
    types: Sequence[int]

    def fit(self, longest: int, side: Side = "right") -> Marked:
        """At most `longest` tokens, those of the texts cut at `side`; what is around them stays. Two texts are cut as
        transformers' longest_first does: the longer one first, then both alike."""
        surplus = len(self.ids) - longest
        if surplus <= 0:
            return self
        first, second = (self.sources.count(source) for source in (0, 1))
        keep = dict(zip((0, 1), _lengths(first, second, max(0, first + second - surplus)), strict=True))
        places = [[i for i, source in enumerate(self.sources) if source == which] for which in (0, 1)]
        kept = {i for which in (0, 1) for i in _some(places[which], keep[which], side)}
        chosen = [i for i, source in enumerate(self.sources) if source is None or i in kept]
        return Marked([self.ids[i] for i in chosen], [self.sources[i] for i in chosen], [self.types[i] for i in chosen])


def _some(places: list[int], count: int, side: Side) -> list[int]:
    return places[:count] if side == "right" else places[len(places) - count :]


def _lengths(first: int, second: int, room: int) -> tuple[int, int]:
    """How much of two texts of these lengths stays in `room`."""
    if first + second <= room:
        return first, second
    short, long = sorted((first, second))
    long = long if short > room else max(short, room - short)
    if short + long > room:
        short, long = room // 2, room - room // 2
    return (short, long) if first <= second else (long, short)

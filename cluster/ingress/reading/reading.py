"""Reading: what a request brings along for its answers to be read."""

from __future__ import annotations

from dataclasses import dataclass

from octavo.cluster.ingress.reading.parts import Reader
from octavo.cluster.ingress.reading.thinking import ThoughtCounter


@dataclass(frozen=True, slots=True)
class Reading:
    """One reader per choice, and one counter where thoughts are counted; without readers, answers are mere text.

    shown_tokens: special tokens that readers must see, though clients do not.
    """

    readers: tuple[Reader, ...] = ()
    counters: tuple[ThoughtCounter, ...] = ()
    shown_tokens: frozenset[int] = frozenset()

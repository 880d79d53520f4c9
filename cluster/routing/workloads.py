"""Workloads of the Simulation: conversations, shared system prompts, prompts that share nothing. Seeded. Times in s."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from octavo.cluster.routing.simulation import Arrival

VOCABULARY = 1 << 16


def tokens(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.choices(range(VOCABULARY), k=count))


def skewed(rng: random.Random, median: int, longest: int, spread: float = 0.8) -> int:
    """A log-normal length: most are short, a few are very long."""
    return max(1, min(longest, round(median * rng.lognormvariate(0.0, spread))))


def poisson(rng: random.Random, rate: float, count: int) -> Iterator[float]:
    now = 0.0
    for _ in range(count):
        now += rng.expovariate(rate)
        yield now


def bursts(rng: random.Random, rate: float, count: int, size: int) -> Iterator[float]:
    """`count` arrivals at `rate` per second on average, in bursts of about `size` at once."""
    now = 0.0
    while count > 0:
        now += rng.expovariate(rate / size)
        for _ in range(min(count, rng.randint(size // 2, size + size // 2))):
            yield now
            count -= 1


@dataclass(slots=True)
class Conversations:
    """Each turn's prompt is all that was said before, and something new; some thinking lies between two turns."""

    count: int
    per_s: float
    turns: tuple[int, int] = (3, 8)
    opening: int = 400
    question: int = 60
    answer: int = 100
    thinking_s: float = 6.0
    seed: int = 0
    _left: dict[int, int] = field(default_factory=dict)
    _rng: random.Random = field(default_factory=random.Random)

    def arrivals(self) -> Iterable[Arrival]:
        self._rng = rng = random.Random(self.seed)
        for session, at in enumerate(poisson(rng, self.per_s, self.count)):
            self._left[session] = rng.randint(*self.turns) - 1
            yield Arrival(at, tokens(rng, skewed(rng, self.opening, 4000)), skewed(rng, self.answer, 500), session)

    def after(self, arrival: Arrival, output: tuple[int, ...], now_s: float) -> Arrival | None:
        if not self._left[arrival.session]:
            return None
        self._left[arrival.session] -= 1
        rng = self._rng
        prompt = arrival.prompt + output + tokens(rng, skewed(rng, self.question, 1000))
        at = now_s + rng.expovariate(1.0 / self.thinking_s)
        return Arrival(at, prompt, skewed(rng, self.answer, 500), arrival.session)


@dataclass(frozen=True, slots=True)
class SystemPrompts:
    """`prompts` system prompts of `length` tokens, some far more popular than others, each before a short question."""

    count: int
    per_s: float
    prompts: int = 40
    length: int = 2000
    question: int = 80
    answer: int = 60
    burst: int = 1
    seed: int = 0

    def arrivals(self) -> Iterable[Arrival]:
        rng = random.Random(self.seed)
        system = [tokens(rng, self.length) for _ in range(self.prompts)]
        popularity = [1.0 / (rank + 1) for rank in range(self.prompts)]
        times = (
            poisson(rng, self.per_s, self.count) if self.burst == 1 else bursts(rng, self.per_s, self.count, self.burst)
        )
        for at in times:
            (chosen,) = rng.choices(system, popularity)
            yield Arrival(at, chosen + tokens(rng, skewed(rng, self.question, 1000)), skewed(rng, self.answer, 300))

    def after(self, arrival: Arrival, output: tuple[int, ...], now_s: float) -> Arrival | None:
        return None


@dataclass(frozen=True, slots=True)
class Strangers:
    """Prompts that share nothing, of very different lengths. burst: requests that come at once."""

    count: int
    per_s: float
    prompt: int = 500
    spread: float = 1.0
    answer: int = 60
    burst: int = 1
    seed: int = 0

    def arrivals(self) -> Iterable[Arrival]:
        rng = random.Random(self.seed)
        times = (
            poisson(rng, self.per_s, self.count) if self.burst == 1 else bursts(rng, self.per_s, self.count, self.burst)
        )
        for at in times:
            prompt = tokens(rng, skewed(rng, self.prompt, 8000, self.spread))
            yield Arrival(at, prompt, skewed(rng, self.answer, 400))

    def after(self, arrival: Arrival, output: tuple[int, ...], now_s: float) -> Arrival | None:
        return None

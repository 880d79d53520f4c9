"""What several engines did with the same prompts, and what follows: speeds, ratios, goals, agreement of tokens.

Knows numbers. Does not know processes or tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from statistics import median
from typing import Literal

from metrics import throughput

AGREE_ON = 16  # tokens; later ones may differ where two logits are nearly equal
Part = Literal["whole", "prefill", "decode"]


@dataclass(frozen=True, slots=True)
class Work:
    """Of each prompt, in tokens."""

    input_len: int
    output_len: int

    def tokens(self, n: int, part: Part) -> int:
        """What is counted: generated tokens, but a prefill's are those of the prompts. The prefill gives the first."""
        return n * {"whole": self.output_len, "prefill": self.input_len, "decode": self.output_len - 1}[part]


@dataclass(slots=True)
class Measured:
    """What an engine did. Per n, one entry per round: seconds of the whole work, and of the same with one output token.

    token_ids: of all rounds' prompts, in order.
    """

    versions: dict[str, str]
    notes: str
    load_s: float
    seconds: dict[int, list[float]] = field(default_factory=dict)
    first_token_s: dict[int, list[float]] = field(default_factory=dict)
    token_ids: dict[int, list[list[int]]] = field(default_factory=dict)

    def part_s(self, n: int, part: Part) -> list[float]:
        """Seconds of each round. Decode: the whole less the prefill, which is the same work with one output token."""
        whole, prefill = self.seconds.get(n, []), self.first_token_s.get(n, [])
        if part == "whole":
            return whole
        return prefill if part == "prefill" else [a - b for a, b in zip(whole, prefill, strict=False)]


@dataclass(frozen=True, slots=True)
class Goal:
    """Speed of `ours` ÷ speed of the fastest of `peers`, to be at least `at_least`."""

    ours: str
    peers: tuple[str, ...]
    n: int
    at_least: float
    part: Part = "whole"


VLLMS = ("vllm", "vllm-best", "vllm-best-eager")
GOALS = (
    *(Goal("octavo", VLLMS, n, least) for n, least in ((1, 2.5), (8, 1.7), (32, 1.5))),
    *(Goal("octavo-int8", VLLMS, n, least) for n, least in ((1, 5.0), (8, 4.0), (32, 3.5))),
    Goal("octavo-gguf", ("llama",), 1, 1.5, "decode"),
    Goal("octavo-gguf", ("llama",), 1, 3.0, "prefill"),
    *(Goal("octavo-gguf", ("llama",), n, 2.0) for n in (8, 32)),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A goal and what was measured. peer: the one of the goal's peers that comes closest. ratios: of each round."""

    goal: Goal
    peer: str
    ours_tps: float
    peer_tps: float
    ratios: tuple[float, ...]

    @property
    def ratio(self) -> float:
        return median(self.ratios)

    @property
    def met(self) -> bool:
        return self.ratio >= self.goal.at_least


def speed(result: Measured, n: int, work: Work, part: Part = "whole") -> float | None:
    """Tokens/s, median over the rounds; None if nothing was measured."""
    seconds = result.part_s(n, part)
    return throughput(work.tokens(n, part), median(seconds)) if seconds else None


def ratios(ours: Measured, theirs: Measured, n: int, part: Part = "whole") -> tuple[float, ...]:
    """Our speed ÷ theirs in each round: the two ran within a minute, so noise disturbs these least."""
    pairs = zip(ours.part_s(n, part), theirs.part_s(n, part), strict=False)
    return tuple(b / a for a, b in pairs)


def verdicts(results: Mapping[str, Measured], work: Work, goals: Sequence[Goal] = GOALS) -> list[Verdict]:
    """Of the goals of which both sides were measured."""
    found = []
    for goal in goals:
        measured = {name: results[name] for name in goal.peers if name in results}
        candidates = [
            _verdict(goal, name, results[goal.ours], peer, work)
            for name, peer in measured.items()
            if goal.ours in results and ratios(results[goal.ours], peer, goal.n, goal.part)
        ]
        if candidates:
            found.append(min(candidates, key=lambda verdict: verdict.ratio))
    return found


def _verdict(goal: Goal, name: str, ours: Measured, peer: Measured, work: Work) -> Verdict:
    ours_tps, peer_tps = (speed(result, goal.n, work, goal.part) or 0.0 for result in (ours, peer))
    return Verdict(goal, name, ours_tps, peer_tps, ratios(ours, peer, goal.n, goal.part))


def common_lengths(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> list[int]:
    """Of each pair of token lists, how many tokens they have in common before they part."""
    return [
        sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
        for a, b in zip(ours, theirs, strict=False)
    ]


def agreement(
    ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]], first: int = AGREE_ON
) -> tuple[float, float]:
    """(part of the prompts whose first `first` tokens are equal, mean length of the common beginning in tokens)."""
    common = common_lengths(ours, theirs)
    if not common:
        return 0.0, 0.0
    needed = min(first, min(len(ids) for ids in ours))
    return sum(length >= needed for length in common) / len(common), sum(common) / len(common)

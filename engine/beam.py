"""Beam search: which of the likeliest continuations of several beams live on, and when the search is over.

Knows tokens and log probabilities. Does not know models, blocks, text or who computes the scores: whoever does hands
over, per live beam, its likeliest next tokens, and carries out the forks. The rules are those of transformers'
`generate(num_beams=…)`; beams and scores are compared in the same way, so the results are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from octavo.engine.errors import RequestError

MAX_BEAM_WIDTH = 128


@dataclass(frozen=True, slots=True)
class Beams:
    """How to search. `width` beams at a time. length_penalty: a beam of L tokens counts as its log probability divided
    by L ** length_penalty, so above 0 favours long ones.

    early_stopping: True ends when `width` beams have ended; False when the best live beam, were it to end now, could
    not join them; "never" when it could not even at its longest.

    Raises RequestError, naming the field, for a value out of range.
    """

    width: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        if type(self.width) is not int or not 1 <= self.width <= MAX_BEAM_WIDTH:
            raise RequestError(f"The beam width must be between 1 and {MAX_BEAM_WIDTH}, got {self.width!r}.", "n")
        penalty = self.length_penalty
        if isinstance(penalty, bool) or not isinstance(penalty, int | float) or not -20 <= penalty <= 20:
            raise RequestError("length_penalty must be a number in [-20, 20].", "length_penalty")
        object.__setattr__(self, "length_penalty", float(penalty))
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise RequestError(
                f'early_stopping must be true, false or "never", got {self.early_stopping!r}.', "early_stopping"
            )


class Scores(Protocol):
    """The likeliest next tokens of a beam, in descending order, behind one entry that is not looked at (see
    octavo.engine.types.TokenLogprobs)."""

    @property
    def token_ids(self) -> tuple[int, ...]: ...

    @property
    def logprobs(self) -> tuple[float, ...]: ...


@dataclass(frozen=True, slots=True)
class Fork:
    """A beam that lives on: the one at `parent` in the last generation, and one more token."""

    parent: int
    token: int


@dataclass(frozen=True, slots=True)
class Step:
    """A token of a beam: the entry of `scores` at `place`, and all tokens before it."""

    before: Step | None
    scores: Any
    place: int

    def path(self) -> list[Step]:
        """All steps of the beam, from its first token on."""
        return list(self._backwards())[::-1]

    @property
    def token(self) -> int:
        return int(self.scores.token_ids[self.place])

    @property
    def logprob(self) -> float:
        return float(self.scores.logprobs[self.place])

    def _backwards(self) -> Iterator[Step]:
        step: Step | None = self
        while step is not None:
            yield step
            step = step.before


@dataclass(frozen=True, slots=True)
class Beam:
    """A live beam, or an ended one. stopped: by its last token, which is one of the stop tokens."""

    last: Step | None
    logprob: float
    score: float = 0.0
    stopped: bool = False


class BeamSearch:
    """One search. `live`: the beams to be scored next, the best first; at the start one, without tokens.

    stop_token_ids: end a beam, once it has `min_tokens` tokens before them. max_tokens: at least 1. Whoever scores must
    give `needed` tokens per beam, or all there are.
    """

    def __init__(self, beams: Beams, stop_token_ids: frozenset[int], min_tokens: int, max_tokens: int) -> None:
        self.needed = beams.width + len(stop_token_ids)
        self.live = [Beam(None, 0.0)]
        self.done = False
        self._beams = beams
        self._stops = stop_token_ids
        self._min_tokens = min_tokens
        self._max_tokens = max_tokens
        self._length = 0
        self._ended: list[Beam] = []  # the best `width`, best first

    def advance(self, scores: Sequence[Scores]) -> list[Fork]:
        """One more token for every beam: `scores[i]` belongs to `live[i]`. Returns the new `live` as forks of the old,
        in order. Afterwards `done` may be true, and the forks are of no use."""
        assert len(scores) == len(self.live), f"{len(scores)} scores for {len(self.live)} beams"
        self._length += 1
        at_end = self._length >= self._max_tokens
        full = len(self._ended) == self._beams.width
        takes_more = not (full and self._beams.early_stopping is True)
        forks: list[Fork] = []
        live: list[Beam] = []
        for rank, (logprob, parent, place) in enumerate(self._ranked(scores)):
            token = scores[parent].token_ids[place]
            stops = token in self._stops
            if stops or at_end:
                if rank < self._beams.width and takes_more:
                    score = logprob / self._length**self._beams.length_penalty
                    self._ended.append(Beam(self._step(scores, parent, place), logprob, score, stops))
            elif len(forks) < self._beams.width:
                forks.append(Fork(parent, token))
                live.append(Beam(self._step(scores, parent, place), logprob))
            elif rank >= self._beams.width:
                break
        self._ended = sorted(self._ended, key=lambda beam: -beam.score)[: self._beams.width]
        self.live = live
        self.done = at_end or not live or not self._can_improve()
        return forks

    def best(self, count: int) -> list[Beam]:
        """The `count` best beams that have ended, the best first."""
        return self._ended[:count]

    def _ranked(self, scores: Sequence[Scores]) -> list[tuple[float, int, int]]:
        """All continuations as (log probability, parent, place in its scores), the likeliest first."""
        silent = self._stops if self._length <= self._min_tokens else frozenset()
        found = [
            (beam.logprob + entry.logprobs[place], parent, place)
            for parent, (beam, entry) in enumerate(zip(self.live, scores, strict=True))
            for place in range(1, min(len(entry.token_ids), self.needed + 1))
            if entry.token_ids[place] not in silent
        ]
        found.sort(key=lambda item: -item[0])  # stable: of equals, the better beam's likelier token first
        return found

    def _step(self, scores: Sequence[Scores], parent: int, place: int) -> Step:
        return Step(self.live[parent].last, scores[parent], place)

    def _can_improve(self) -> bool:
        """Whether a live beam may still become one of the best."""
        beams = self._beams
        if len(self._ended) < beams.width:
            return True
        if beams.early_stopping is True:
            return False
        to_the_end = beams.early_stopping == "never" and beams.length_penalty > 0
        length = self._max_tokens if to_the_end else self._length
        return bool(self.live[0].logprob / length**beams.length_penalty > self._ended[-1].score)

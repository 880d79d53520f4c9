"""BeamGroup: the sequences of one beam search, which take every step together.

Knows sequences and the search. Does not know blocks or slots: the scheduler, which owns them, carries out the moves.

Each beam of the search has a member. A member whose scores are in waits for the others (it has no pending token and
none to compute); when all are in, the search says which beams live on, and each gets a member: a beam's first
continuation keeps its member, and with it slot and blocks, the others take over members whose beam has died. They share
the parent's blocks, copy-on-write. A member without work is *parked*: it may be anywhere, and holds nothing that could
not be had again, so members can take turns where there is no room for all.
"""

from __future__ import annotations

from dataclasses import dataclass

from octavo.engine.beam import Beam, BeamSearch, Step
from octavo.engine.core.sequence import Sequence
from octavo.engine.params import SamplingParams
from octavo.engine.types import FinishReason, Request, TokenDelta, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Move:
    """`member` takes over a copy of `parent`, as it was, and goes on with `token`."""

    member: Sequence
    parent: Sequence
    token: int


class BeamGroup:
    """`members`: as many as the search is wide; the first computes the prompt, the others have no beam at the start.

    params: what the ranks draw by: nothing is drawn, the scores are all that counts.
    """

    def __init__(self, request: Request, members: list[Sequence], eos_token_ids: tuple[int, ...]) -> None:
        params, first = request.params, members[0]
        assert params.beams is not None, request.request_id
        self.members = members
        self.search = BeamSearch(
            params.beams, first.stop_token_ids, params.min_tokens, first.max_total - first.num_prompt
        )
        asked = params.logprobs or 0
        self.params: SamplingParams = params.replace(
            n=1, beams=None, temperature=0.0, min_tokens=0, logprobs=-1 if asked < 0 else max(self.search.needed, asked)
        )
        self._request = request
        self._own_stops = first.stop_token_ids - set(() if params.ignore_eos else eos_token_ids)
        self._order = [first]  # the member of each live beam
        self._scores: dict[int, TokenLogprobs] = {}  # by the member's index
        for member in members:
            member.is_beam, member.params = True, self.params

    def has_scores(self, member: Sequence) -> bool:
        """Whether nothing is to be computed for the member until the others have caught up (or at all)."""
        return member.index in self._scores or all(other is not member for other in self._order)

    def take(self, member: Sequence, scores: TokenLogprobs) -> bool:
        """The scores of the member's next token. Returns whether they were the last ones missing."""
        self._scores[member.index] = scores
        return len(self._scores) == len(self._order)

    def advance(self) -> tuple[list[Move], list[Move], list[Sequence]]:
        """The search's next generation, once all scores are in: (members that go on with their own beam, members that
        take over another's, members without a beam)."""
        forks = self.search.advance([self._scores[member.index] for member in self._order])
        self._scores.clear()
        parents = self._order
        keeping: dict[int, Move] = {}  # by the place of the parent
        for fork in forks:
            parent = parents[fork.parent]
            keeping.setdefault(parent.index, Move(parent, parent, fork.token))
        # Those who hold a slot first: a member that takes over needs one.
        free = [member for member in self.members if member.index not in keeping]
        free.sort(key=lambda member: member.slot < 0)
        self._order, takers, kept = [], [], set()
        for fork in forks:
            parent = parents[fork.parent]
            if parent.index in kept:
                takers.append(Move(free.pop(0), parent, fork.token))
                self._order.append(takers[-1].member)
            else:
                kept.add(parent.index)
                self._order.append(parent)
        return list(keeping.values()), takers, free

    def deltas(self) -> list[TokenDelta]:
        """The end of the request: its best beams, one per sequence that was asked for."""
        best = self.search.best(self._request.params.n)
        return [self._delta(wanted.index, best[wanted.index]) for wanted in self._request.sequences]

    def ends(self, reason: FinishReason, error: str | None = None) -> list[TokenDelta]:
        """The end of a request that found nothing."""
        request_id, cached = self._request.request_id, self.members[0].num_cached
        return [
            TokenDelta(request_id, wanted.index, (), finish_reason=reason, num_cached_tokens=cached, error=error)
            for wanted in self._request.sequences
        ]

    def _delta(self, index: int, beam: Beam) -> TokenDelta:
        assert beam.last is not None
        steps, first, wanted = beam.last.path(), self.members[0], self._request.params.logprobs
        scores = first.prompt_logprobs if index == 0 else None
        return TokenDelta(
            request_id=self._request.request_id,
            index=index,
            token_ids=tuple(step.token for step in steps),
            logprobs=() if wanted is None else tuple(_logprobs(step, wanted) for step in steps),
            finish_reason="stop" if beam.stopped else "length",
            stop_reason=steps[-1].token if beam.stopped and steps[-1].token in self._own_stops else None,
            num_cached_tokens=first.num_cached,
            prompt_logprobs=None if scores is None else tuple(scores),
        )


def _logprobs(step: Step, count: int) -> TokenLogprobs:
    """What a client who asked for `count` candidates sees of a step."""
    end = len(step.scores.token_ids) if count < 0 else count + 1
    return TokenLogprobs(
        token_ids=(step.token, *step.scores.token_ids[1:end]),
        logprobs=(step.logprob, *step.scores.logprobs[1:end]),
        rank=step.place,
    )

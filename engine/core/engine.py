"""EngineCore: the step loop of one replica, schedule → launch → collect → commit.

Knows the scheduler and a process that executes plans. Does not know how a plan is executed, nor text, HTTP or threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from octavo.engine.core.constraints import Grammars, NoGrammars
from octavo.engine.core.forms import Compiling
from octavo.engine.core.plan import StepPlan, StepResult, TokenMasks
from octavo.engine.core.scheduler import Scheduler
from octavo.engine.errors import OctavoError, RequestError, StepError
from octavo.engine.types import EngineStats, FinishReason, PhaseTimes, RankStatus, Request, TokenDelta

LOOK_S = 0.005  # between looks at the inbox while there is nothing to do but wait for a form to be compiled


class Process(Protocol):
    """Executes plans on every rank of the replica, in the order of launch."""

    def launch(self, plan: StepPlan) -> None:
        """Start executing; returns at once. Never raises for what goes wrong in the step: `collect` does."""

    def constrain(self, masks: TokenMasks) -> None:
        """What the masked rows of a launched step may draw, which waits for it. Returns at once, and never raises."""

    def collect(self) -> StepResult:
        """Wait for the oldest launched step. Raises StepError (that step failed) or RankLost (the replica is gone)."""

    def check(self) -> None:
        """Raise RankLost if a rank is gone. Returns at once; to be called every second or so while nothing runs."""

    def ranks(self) -> tuple[RankStatus, ...]:
        """All ranks, in order. Returns at once; may be called from any thread."""

    def close(self) -> None:
        """Stop the ranks and free what they hold."""


class EngineCore:
    """One request in, token deltas out. Called from one thread.

    `lag` is the number of steps that may be in flight when a plan is made: 1 plans step N+1 while N runs, 0 waits; a
    pipeline has one less than it has stages. grammars: for requests whose output is to have a form.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        process: Process,
        clock: Callable[[], float],
        lag: int = 1,
        grammars: Grammars | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.process = process
        self.clock = clock
        self._forms = Compiling(grammars or NoGrammars())
        self._lag = lag
        self._in_flight = 0
        self._followed: deque[bool] = deque()  # of the steps in flight: whether it was planned while one ran
        self._step_s, self._gap_s = 0.0, 0.0
        self._last_step_at = clock()
        # Of requests without a token: when they were queued, and when the first row of those admitted was planned.
        self._queued_at: dict[str, float] = {}
        self._started_at: dict[str, float] = {}
        self._first_tokens, self._first_token_s = 0, 0.0

    def check_request(self, request: Request) -> None:
        """Raise RequestError if the request can never run here."""
        self.scheduler.check(request)
        if request.request_id in self._forms:
            raise RequestError(f"request_id {request.request_id!r} is in use by a queued request.", "request_id")

    def prepare(self, requests: Sequence[Request]) -> None:
        """Compile the forms of `requests`, and wait for it. Raises RequestError if one cannot be used."""
        self._forms.prepare([r.params.structured_outputs for r in requests if r.params.structured_outputs is not None])

    def check_room(self, on_the_way: int = 0) -> None:
        """Raise CapacityError if the queue is full, with sequences that are `on_the_way`."""
        self.scheduler.check_room(on_the_way + len(self._forms))

    def add(self, request: Request) -> list[TokenDelta]:
        """Queue a request. Raises RequestError or CapacityError. Returns what ends at once (see Scheduler.add)."""
        self.check_request(request)
        grammar = None
        if request.params.structured_outputs is not None and request.pooling is None:
            self.check_room()
            grammar = self._forms.begin(request)
            if grammar is None:
                self._queued_at[request.request_id] = self.clock()
                return []
        ended = self.scheduler.add(request, grammar)
        if self.scheduler.is_live(request.request_id):
            self._queued_at[request.request_id] = self.clock()
        return ended

    def abort(self, request_id: str) -> list[TokenDelta]:
        """End a request now: its blocks are free before the next step is planned."""
        self._queued_at.pop(request_id, None)
        self._started_at.pop(request_id, None)
        dropped = self._forms.drop(request_id)
        return _ends(dropped, "abort") if dropped is not None else self.scheduler.abort(request_id)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._in_flight > 0 or len(self._forms) > 0

    def step(self) -> list[TokenDelta]:
        """One turn of the loop. Returns what became known; often that of the step before the one just launched."""
        ended = self._take_compiled() if len(self._forms) else []
        return ended + self._step()

    def _step(self) -> list[TokenDelta]:
        plan = self.scheduler.schedule()
        if plan is not None:
            if self.scheduler.admitted:
                self._started_at.update(dict.fromkeys(self.scheduler.admitted, self.clock()))
            self.process.launch(plan)
            self._followed.append(self._in_flight > 0)
            self._in_flight += 1
            self._constrain()
        elif self._in_flight == 0 and len(self._forms):
            self._forms.wait(LOOK_S)
        if self._in_flight == 0 or (plan is not None and self._in_flight <= self._lag):
            return []
        self._in_flight -= 1
        followed = self._followed.popleft()
        try:
            result = self.process.collect()
            self._step_s += result.seconds
            self._gap_s += result.gap_s if followed else 0.0
            deltas = self.scheduler.commit(result)
        except StepError as error:
            deltas = self.scheduler.fail(str(error))
        self._constrain()
        self._last_step_at = self.clock()
        if self._queued_at:
            deltas = [self._timed(delta) if delta.request_id in self._queued_at else delta for delta in deltas]
        return deltas

    def _constrain(self) -> None:
        """Hand over the masks that are due: the ranks compute meanwhile, and wait for them before they draw."""
        for masks in self.scheduler.due_masks():
            self.process.constrain(masks)

    def _take_compiled(self) -> list[TokenDelta]:
        ended: list[TokenDelta] = []
        for request, grammar in self._forms.ready():
            try:
                if isinstance(grammar, OctavoError):
                    raise grammar
                ended += self.scheduler.add(request, grammar)
            except OctavoError as error:
                ended += _ends(request, "error", error)
            if not self.scheduler.is_live(request.request_id):
                self._queued_at.pop(request.request_id, None)
        return ended

    def check(self) -> None:
        """Raise RankLost if a rank is gone (see Process.check)."""
        self.process.check()

    def stats(self) -> EngineStats:
        stats = self.scheduler.stats()
        return replace(
            stats,
            num_waiting=stats.num_waiting + len(self._forms),
            last_step_at=self._last_step_at,
            first_tokens=self._first_tokens,
            first_token_s=self._first_token_s,
            step_s=self._step_s,
            gap_s=self._gap_s,
        )

    def ranks(self) -> tuple[RankStatus, ...]:
        return self.process.ranks()

    def _timed(self, delta: TokenDelta) -> TokenDelta:
        """`delta`, its request's first, with what it says of the time until then, if it has a token or is pooled."""
        queued_at, now = self._queued_at.pop(delta.request_id), self._last_step_at
        started_at = self._started_at.pop(delta.request_id, now)
        if not delta.token_ids and delta.pooled is None:
            return delta
        self._first_tokens += 1
        self._first_token_s += now - queued_at
        return replace(delta, times=PhaseTimes(started_at - queued_at, now - started_at))

    def close(self) -> None:
        self._forms.close()
        self.process.close()


def _ends(request: Request, reason: FinishReason, error: OctavoError | None = None) -> list[TokenDelta]:
    """Of a request that no scheduler has seen."""
    message = None if error is None else str(error)
    param = error.param or "structured_outputs" if isinstance(error, RequestError) else None
    return [
        TokenDelta(request.request_id, s.index, (), finish_reason=reason, error=message, error_param=param)
        for s in request.sequences
    ]

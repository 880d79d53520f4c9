"""EngineCore: the step loop of one replica, schedule → launch → collect → commit.

Knows the scheduler and a process that executes plans. Does not know how a plan is executed, nor text, HTTP or threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from octavo.engine.core.plan import StepPlan, StepResult
from octavo.engine.core.scheduler import Scheduler
from octavo.engine.errors import StepError
from octavo.engine.types import EngineStats, PhaseTimes, RankStatus, Request, TokenDelta


class Process(Protocol):
    """Executes plans on every rank of the replica, in the order of launch."""

    def launch(self, plan: StepPlan) -> None:
        """Start executing; returns at once. Never raises for what goes wrong in the step: `collect` does."""

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
    pipeline has one less than it has stages.
    """

    def __init__(self, scheduler: Scheduler, process: Process, clock: Callable[[], float], lag: int = 1) -> None:
        self.scheduler = scheduler
        self.process = process
        self.clock = clock
        self._lag = lag
        self._in_flight = 0
        self._last_step_at = clock()
        # Of requests without a token: when they were queued, and when the first row of those admitted was planned.
        self._queued_at: dict[str, float] = {}
        self._started_at: dict[str, float] = {}
        self._first_tokens, self._first_token_s = 0, 0.0

    def add(self, request: Request) -> list[TokenDelta]:
        """Queue a request. Raises RequestError or CapacityError. Returns what ends at once (see Scheduler.add)."""
        ended = self.scheduler.add(request)
        if self.scheduler.is_live(request.request_id):
            self._queued_at[request.request_id] = self.clock()
        return ended

    def abort(self, request_id: str) -> list[TokenDelta]:
        """End a request now: its blocks are free before the next step is planned."""
        self._queued_at.pop(request_id, None)
        self._started_at.pop(request_id, None)
        return self.scheduler.abort(request_id)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._in_flight > 0

    def step(self) -> list[TokenDelta]:
        """One turn of the loop. Returns what became known; often that of the step before the one just launched."""
        plan = self.scheduler.schedule()
        if plan is not None:
            if self.scheduler.admitted:
                self._started_at.update(dict.fromkeys(self.scheduler.admitted, self.clock()))
            self.process.launch(plan)
            self._in_flight += 1
        if self._in_flight == 0 or (plan is not None and self._in_flight <= self._lag):
            return []
        self._in_flight -= 1
        try:
            deltas = self.scheduler.commit(self.process.collect())
        except StepError as error:
            deltas = self.scheduler.fail(str(error))
        self._last_step_at = self.clock()
        if self._queued_at:
            deltas = [self._timed(delta) if delta.request_id in self._queued_at else delta for delta in deltas]
        return deltas

    def check(self) -> None:
        """Raise RankLost if a rank is gone (see Process.check)."""
        self.process.check()

    def stats(self) -> EngineStats:
        return replace(
            self.scheduler.stats(),
            last_step_at=self._last_step_at,
            first_tokens=self._first_tokens,
            first_token_s=self._first_token_s,
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
        self.process.close()

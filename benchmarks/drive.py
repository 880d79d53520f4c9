"""Runs an engine on given prompts as LLM.generate does, with a stopwatch on every part of every step.

Knows the step loop. Reaches into the process of a local engine to time the model by itself.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from metrics import Timing

from octavo.engine.assets import tokenizer_of
from octavo.engine.build import Engine, build_engine
from octavo.engine.config import EngineConfig
from octavo.engine.core.plan import MaskSource, Pending, StepPlan, StepResult, TokenMasks
from octavo.engine.outputs import RequestState
from octavo.engine.params import SamplingParams
from octavo.engine.requests import make_request
from octavo.engine.text.tokenizer import Tokenizer
from octavo.engine.types import TokenDelta


@dataclass(frozen=True, slots=True)
class Step:
    """One turn of the loop, in seconds; the computed step is an earlier plan's if planning runs ahead.

    wall: of the turn. waited: of it, blocked until the ranks were done; the rest is the host's own work. computed: how
    long the ranks worked on the step. model: of that, in the model and its head; the rest builds inputs and samples.
    plan, commit: of the host's work, in the scheduler; the rest of it launches and makes text of tokens.
    """

    rows: int
    tokens: int
    decode: bool  # one token for each row
    wall_s: float
    waited_s: float
    computed_s: float
    model_s: float
    plan_s: float = 0.0
    commit_s: float = 0.0

    @property
    def host_s(self) -> float:
        """Scheduling, committing and detokenizing: hidden behind the ranks' work as long as it takes less than that."""
        return self.wall_s - self.waited_s

    @property
    def text_s(self) -> float:
        return self.host_s - self.plan_s - self.commit_s

    @property
    def rank_bookkeeping_s(self) -> float:
        return self.computed_s - self.model_s


@dataclass(frozen=True, slots=True)
class Run:
    """What a batch of prompts did. `timings` and `token_ids` in the order of the prompts."""

    wall_s: float
    steps: tuple[Step, ...]
    timings: tuple[Timing, ...]
    token_ids: tuple[tuple[int, ...], ...]


class _Stopwatch:
    """Adds up the time spent in calls."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            begin = time.perf_counter()
            try:
                return call(*args)
            finally:
                self.seconds += time.perf_counter() - begin

        return timed


class _TimedRunner:
    """A runner (runner/runner.py) that notes, per step, the time spent in its model's forward and head."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._watch = _Stopwatch()
        runner.forward = self._watch.around(runner.forward)
        runner.model.local_logits = self._watch.around(runner.model.local_logits)
        self.model_s: dict[int, float] = {}

    def execute(self, plan: StepPlan, masks: MaskSource) -> Pending:
        self._watch.seconds = 0.0
        begun: Pending = self._runner.execute(plan, masks)
        self.model_s[plan.step_id] = self._watch.seconds
        return begun

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)


class _TimedScheduler:
    """A scheduler (core/scheduler.py) that notes how long the last plan and the last commit took."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self.plan_s = self.commit_s = 0.0

    def schedule(self) -> StepPlan | None:
        begin = time.perf_counter()
        plan: StepPlan | None = self._scheduler.schedule()
        self.plan_s = time.perf_counter() - begin
        return plan

    def commit(self, result: StepResult) -> list[TokenDelta]:
        begin = time.perf_counter()
        deltas: list[TokenDelta] = self._scheduler.commit(result)
        self.commit_s = time.perf_counter() - begin
        return deltas

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)


class _Watched:
    """A process (core/engine.py) with a stopwatch. Remembers the plan, the result and the wait of the last step."""

    def __init__(self, process: Any) -> None:
        self._process = process
        self._plans: deque[StepPlan] = deque()
        self.collected: tuple[StepPlan, StepResult] | None = None
        self.waited_s = 0.0

    def launch(self, plan: StepPlan) -> None:
        self._plans.append(plan)
        self._process.launch(plan)

    def constrain(self, masks: TokenMasks) -> None:
        self._process.constrain(masks)

    def collect(self) -> StepResult:
        begin = time.perf_counter()
        result: StepResult = self._process.collect()
        self.waited_s = time.perf_counter() - begin
        self.collected = (self._plans.popleft(), result)
        return result

    def close(self) -> None:
        self._process.close()


class Bench:
    """An engine with stopwatches. Raises ConfigError if it cannot be built. Close it."""

    def __init__(self, config: EngineConfig) -> None:
        self.engine: Engine = build_engine(config)
        self.tokenizer: Tokenizer = tokenizer_of(config)
        core = self.engine.core
        self._runner: _TimedRunner | None = None
        if hasattr(core.process, "_runner"):  # an InProcess: its rank is at hand
            core.process._runner = self._runner = _TimedRunner(core.process._runner)
        self._process = _Watched(core.process)
        core.process = self._process
        self._scheduler = _TimedScheduler(core.scheduler)
        core.scheduler = self._scheduler

    def close(self) -> None:
        self.engine.core.close()

    def run(self, prompts: Sequence[Sequence[int]], output_len: int) -> Run:
        """Generate exactly `output_len` tokens for each prompt, greedily, text included. All start together."""
        core = self.engine.core
        params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True, seed=0)
        states = [RequestState(make_request(self.tokenizer, ids, params), None, self.tokenizer) for ids in prompts]
        by_id = {state.request.request_id: state for state in states}
        times: dict[str, list[float]] = {name: [] for name in by_id}
        steps: list[Step] = []
        begin = turn_began = time.perf_counter()
        for state in states:
            core.add(replace(state.request, arrival_time=begin))
        while core.has_work:
            self._process.collected = None
            for delta in core.step():
                now = time.perf_counter()
                by_id[delta.request_id].take(delta, now)
                times[delta.request_id].extend([now] * len(delta.token_ids))
            turn_ended = time.perf_counter()
            if self._process.collected is not None:
                steps.append(self._step(turn_ended - turn_began))
            turn_began = turn_ended
        end = time.perf_counter()
        return Run(
            wall_s=end - begin,
            steps=tuple(steps),
            timings=tuple(
                Timing(begin, times[name][-1], len(ids), len(times[name]), tuple(times[name]))
                for name, ids in zip(by_id, prompts, strict=True)
            ),
            token_ids=tuple(tuple(state.output.outputs[0].token_ids) for state in states),
        )

    def _step(self, wall_s: float) -> Step:
        assert self._process.collected is not None
        plan, result = self._process.collected
        return Step(
            rows=len(plan.rows),
            tokens=plan.num_tokens,
            decode=all(row.num_tokens == 1 for row in plan.rows),
            wall_s=wall_s,
            waited_s=self._process.waited_s,
            computed_s=result.seconds,
            model_s=self._runner.model_s.pop(plan.step_id) if self._runner else result.seconds,
            plan_s=self._scheduler.plan_s,
            commit_s=self._scheduler.commit_s,
        )


def weight_bytes(engine: Engine) -> int | None:
    """What a model's weights take in the form its layers keep them in; None if the model is not in this process."""
    runner = getattr(engine.core.process, "_runner", None)
    if runner is None or not hasattr(runner, "model"):
        return None
    kept = {}  # tied layers share
    for module in runner.model.modules():
        for weight in (getattr(module, "packed", None), *module.parameters(recurse=False)):
            if weight is not None:
                kept[id(weight)] = weight.nbytes
    return sum(kept.values())

"""How many replicas a model needs: a pure decision on what the replicas say of their load. No Ray here, no clock.

Ongoing requests say little of an LLM's load: one may be ten tokens or ten thousand. What makes clients wait is prompts
that queue, a KV pool that is full, and a first token that takes long. Each has a target; the most loaded decides.

- Up at once to what the load needs: as many as carry the tokens that arrive and drain the queue within DRAIN_S, at the
  rate that replicas with a queue are seen to manage. The queue alone would ask for too many: it goes on growing while
  replicas start.
- Down a quarter at a time at most, only while the rest stays below SPARE of every target, and never to where each
  replica would get what has been too much for one before (`_TooMuch`): a pool that looks idle may just be big enough.
  So a constant load is left alone for good, and noise of a fifth around it too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from octavo.cluster.config import Autoscaling
from octavo.engine.types import EngineStats

# In how many seconds a queue that is too long is to be gone.
DRAIN_S = 60.0
# Fewer replicas must be able to do with this part of the targets …
SPARE = 0.65
# … and with this part of a load that has been too much.
SAFE = 0.7
MOST_REMEMBERED = 8
# One who has plenty of room under this many times such a load shows that it was something else that was too much.
BEYOND = 1.25
# A first token that gets this much sooner, or less, by more replicas does not depend on them.
FUTILE = 0.9


@dataclass(frozen=True, slots=True)
class Sample:
    """What one replica says of itself at `at` seconds. Fields below `kv_wanted` are counters since its start."""

    at: float
    requests: float = 0.0  # running and waiting
    queued_tokens: float = 0.0  # prompt tokens that wait or are not computed yet
    kv_held: float = 0.0  # part of its KV pool that sequences hold, 0 to 1
    kv_wanted: float = 0.0  # what the queued tokens will need, in pools
    prompt_tokens: float = 0.0  # computed: what was found in the cache is no work
    generation_tokens: float = 0.0
    first_tokens: float = 0.0
    first_token_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Load:
    """All replicas together over the look-back period; rates in tokens/s.

    replicas: that run and have said something. waiting: requests that wait in ingresses, for a replica to be there at
    all. growth: of the queue. full_rate: prompt tokens/s that one replica manages, as those with a queue show it.
    ttft_s: mean, None where no request has got a token.
    """

    replicas: int = 0
    waiting: float = 0.0
    requests: float = 0.0
    queued_tokens: float = 0.0
    growth: float = 0.0
    kv_held: float = 0.0
    kv_wanted: float = 0.0
    prompt_rate: float = 0.0
    generation_rate: float = 0.0
    full_rate: float = 0.0
    ttft_s: float | None = None

    @property
    def is_idle(self) -> bool:
        return not (self.requests or self.waiting or self.prompt_rate or self.generation_rate)


@dataclass(frozen=True, slots=True)
class Decision:
    """How many replicas there are to be, and why, in words for a log line."""

    replicas: int
    reason: str


@dataclass(frozen=True, slots=True)
class Wanted:
    """Replicas that each signal asks for; 0 = it has no wish."""

    queue: int = 0
    kv: int = 0
    ttft: int = 0

    @property
    def most(self) -> int:
        return max(self.queue, self.kv, self.ttft)


def load_of(series: Sequence[Sequence[Sample]], waiting: float = 0.0) -> Load:
    """From the samples of each replica, in order of time, all of the look-back period."""
    load = Load(waiting=waiting)
    first_tokens = first_token_s = queued_rates = 0.0
    for samples in filter(None, series):
        first, last = samples[0], samples[-1]
        seconds, count = last.at - first.at, len(samples)
        per_second = 1.0 / seconds if seconds > 0 else 0.0
        queued = sum([s.queued_tokens for s in samples]) / count
        prompt_rate = (last.prompt_tokens - first.prompt_tokens) * per_second
        queued_rates += queued * prompt_rate
        first_tokens += last.first_tokens - first.first_tokens
        first_token_s += last.first_token_s - first.first_token_s
        load = Load(
            replicas=load.replicas + 1,
            waiting=waiting,
            requests=load.requests + sum([s.requests for s in samples]) / count,
            queued_tokens=load.queued_tokens + queued,
            growth=load.growth + _growth(samples),
            kv_held=load.kv_held + sum([s.kv_held for s in samples]) / count,
            kv_wanted=load.kv_wanted + sum([s.kv_wanted for s in samples]) / count,
            prompt_rate=load.prompt_rate + prompt_rate,
            generation_rate=load.generation_rate + (last.generation_tokens - first.generation_tokens) * per_second,
        )
    full_rate = queued_rates / load.queued_tokens if load.queued_tokens > 0 else 0.0
    return replace(load, full_rate=full_rate, ttft_s=first_token_s / first_tokens if first_tokens > 0 else None)


def sample_of(stats: EngineStats, block_size: int, at: float = 0.0) -> Sample:
    """From an engine's own numbers."""
    queued = stats.waiting_tokens + stats.prefill_tokens
    return Sample(
        at=at,
        requests=stats.num_running + stats.num_waiting,
        queued_tokens=queued,
        kv_held=stats.kv_usage,
        kv_wanted=queued / (block_size * stats.kv_blocks_total) if stats.kv_blocks_total else 0.0,
        prompt_tokens=stats.prompt_tokens - stats.prefix_hits,
        generation_tokens=stats.generation_tokens,
        first_tokens=stats.first_tokens,
        first_token_s=stats.first_token_s,
    )


class Autoscaler:
    """Decides for one model. What it remembers is of the pool it has watched since it was made."""

    def __init__(self, settings: Autoscaling) -> None:
        self._settings = settings
        self._more_since: float | None = None
        self._fewer_since: float | None = None
        self._fewer = 0  # the most that were wanted since then
        self._too_much = _TooMuch()
        self._tried: tuple[int, float] | None = None  # replicas and TTFT when it last was what asked for more
        self.wanted = Wanted()

    def decide(self, load: Load, target: int, now: float) -> Decision:
        """`target`: replicas that there are to be so far, of which `load.replicas` are there. `now`: seconds."""
        self.wanted = wanted = self._wanted(load, target)
        most = min(max(wanted.most, self._settings.min_replicas), self._settings.max_replicas)
        if load.replicas == 0:  # nothing is known: all are starting, or none is wanted
            self._more_since = self._fewer_since = None
            return Decision(max(target, 1), "a request waits") if load.waiting else Decision(target, "no replica yet")
        if most > target:
            return self._more(most, load, target, now)
        self._more_since = None
        fewest = self._fewest(load, target)
        if fewest < target:
            return self._less(fewest, load, target, now)
        self._fewer_since = None
        return Decision(target, "as wanted")

    # ── more ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _wanted(self, load: Load, target: int) -> Wanted:
        if load.replicas == 0:
            return Wanted(queue=int(load.waiting > 0))
        settings, there = self._settings, load.replicas
        if self._has_room(load, there):
            self._too_much.unlearn(load)
        held = math.ceil(load.kv_held / settings.target_kv_usage)
        queue = self._bounded(math.ceil(load.queued_tokens / settings.target_queued_tokens), load, target)
        wanting = self._bounded(math.ceil((load.kv_held + load.kv_wanted) / settings.target_kv_usage), load, target)
        return Wanted(queue, max(held, wanting), self._wanted_for_ttft(load, there))

    def _bounded(self, backlog: int, load: Load, target: int) -> int:
        """What a backlog asks for, but no more than work it off in time."""
        if backlog <= load.replicas:
            return backlog
        if load.full_rate <= 0:  # nothing has been computed yet: nobody knows how long it takes
            return min(backlog, load.replicas + 1)
        to_do = max(0.0, load.prompt_rate + load.growth)
        if load.replicas >= target:  # else those that start were asked for with the queue in mind
            to_do += load.queued_tokens / DRAIN_S
        return min(backlog, math.ceil(to_do / load.full_rate - 1e-9))

    def _wanted_for_ttft(self, load: Load, there: int) -> int:
        target = self._settings.target_ttft_s
        if target is None or load.ttft_s is None:
            return 0
        if load.ttft_s <= target:
            self._tried = None
            return 0
        if self._tried is not None and there > self._tried[0] and load.ttft_s > FUTILE * self._tried[1]:
            return 0
        return math.ceil(there * min(2.0, load.ttft_s / target))

    def _more(self, most: int, load: Load, target: int, now: float) -> Decision:
        self._fewer_since = None
        if self._more_since is None:
            self._more_since = now
        if now - self._more_since < self._settings.upscale_delay_s:
            return Decision(target, f"{most} are wanted, for {now - self._more_since:.0f} s so far")
        self._more_since = None
        if load.replicas == target:  # KV too: more replicas hold less in all, since requests end sooner
            self._too_much.learn(load)
        if self.wanted.ttft == self.wanted.most and load.ttft_s is not None:
            self._tried = (load.replicas, load.ttft_s)
        return Decision(most, self._why(load))

    def _why(self, load: Load) -> str:
        settings, there = self._settings, load.replicas
        if self.wanted.queue == self.wanted.most:
            queued = load.queued_tokens / there
            return f"{queued:.0f} prompt tokens wait per replica (target {settings.target_queued_tokens:g})"
        if self.wanted.kv == self.wanted.most:
            usage = (load.kv_held + load.kv_wanted) / there
            return f"the KV pools are used and wanted to {usage:.0%} (target {settings.target_kv_usage:.0%})"
        return f"the first token takes {load.ttft_s:.2f} s (target {settings.target_ttft_s:g} s)"

    # ── fewer ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _fewest(self, load: Load, target: int) -> int:
        """The fewest that the load could do with, from where the pool is now."""
        settings = self._settings
        if load.is_idle and target <= 1:
            return settings.min_replicas
        lowest = max(1, settings.min_replicas, target - max(1, target // 4))
        fits = (n for n in range(lowest, target) if self._has_room(load, n) and not self._too_much.covers(load, n))
        return next(fits, target)

    def _has_room(self, load: Load, replicas: int) -> bool:
        settings = self._settings
        return (
            load.kv_held + load.kv_wanted <= SPARE * settings.target_kv_usage * replicas
            and load.queued_tokens <= SPARE * settings.target_queued_tokens * replicas
            and (settings.target_ttft_s is None or (load.ttft_s or 0.0) <= SPARE * settings.target_ttft_s)
        )

    def _less(self, fewest: int, load: Load, target: int, now: float) -> Decision:
        settings = self._settings
        if self._fewer_since is None:
            self._fewer_since, self._fewer = now, fewest
        self._fewer = max(self._fewer, fewest)
        delay_s = settings.downscale_delay_s
        if fewest == 0 and settings.downscale_to_zero_delay_s is not None:
            delay_s = settings.downscale_to_zero_delay_s
        if now - self._fewer_since < delay_s:
            return Decision(target, f"{self._fewer} would do, for {now - self._fewer_since:.0f} s so far")
        self._fewer_since = None
        if self._fewer == 0:
            return Decision(0, f"no request for {delay_s:g} s")
        return Decision(self._fewer, f"{self._fewer} have done for {delay_s:g} s")


class _TooMuch:
    """Loads per replica, (prompt tokens/s, generated tokens/s), under which there were too few replicas."""

    def __init__(self) -> None:
        self._loads: list[tuple[float, float]] = []

    def learn(self, load: Load) -> None:
        new = (load.prompt_rate / load.replicas, load.generation_rate / load.replicas)
        if not any(new):  # nothing has been computed yet: a pool without requests would do no less
            return
        kept = [old for old in self._loads if not (new[0] <= old[0] and new[1] <= old[1])]
        self._loads = [*kept, new][-MOST_REMEMBERED:]

    def unlearn(self, load: Load) -> None:
        """Forget what is less than `load`, which replicas bear easily: then it was something else that was too much."""
        prompt, generation = load.prompt_rate / load.replicas, load.generation_rate / load.replicas
        self._loads = [old for old in self._loads if not (prompt > BEYOND * old[0] and generation > BEYOND * old[1])]

    def covers(self, load: Load, replicas: int) -> bool:
        """Whether so many replicas might have as much to do as has been too much."""
        prompt, generation = load.prompt_rate / replicas, load.generation_rate / replicas
        return any(prompt >= SAFE * old[0] and generation >= SAFE * old[1] for old in self._loads)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _growth(samples: Sequence[Sample]) -> float:
    """Of the queue, in tokens/s: between the means of the period's halves, since single values jump."""
    if len(samples) < 2:
        return 0.0
    half = len(samples) // 2
    older, newer = samples[:half], samples[-half:]
    seconds = _mean([s.at for s in newer]) - _mean([s.at for s in older])
    change = _mean([s.queued_tokens for s in newer]) - _mean([s.queued_tokens for s in older])
    return change / seconds if seconds > 0 else 0.0

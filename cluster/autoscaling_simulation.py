"""A pool of replicas as a fluid, to see what an Autoscaler does with a load over hours in a second. No Ray, no engine.

Requests are amounts, all alike: a replica admits them while it has slots and KV, and finishes them at the rate that
its batch allows, until the batch costs as much time as there is. Replicas take time to start.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from octavo.cluster.autoscaling import Autoscaler, Load, Sample, load_of
from octavo.cluster.config import Autoscaling

REPORTS_PER_PERIOD = 5
LAST = 1e-3  # of a request: less is none


@dataclass(frozen=True, slots=True)
class Machine:
    """One replica and its requests: capacity_s requests/s at most, one alone takes alone_s seconds."""

    capacity_s: float = 2.0
    alone_s: float = 10.0
    slots: float = 64.0
    prompt_tokens: float = 500.0
    generation_tokens: float = 200.0
    pool_tokens: float = 100_000.0
    start_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Moment:
    """What was so at one time. needed: the fewest replicas that could carry what arrived. wait_s: a newcomer's."""

    at: float
    replicas: int
    target: int
    needed: float
    wait_s: float
    reason: str


@dataclass(eq=False, slots=True)
class _Replica:
    machine: Machine
    ready_at: float
    waiting: float = 0.0
    running: float = 0.0
    samples: deque[Sample] = field(default_factory=deque)
    admitted: float = 0.0
    done: float = 0.0
    wait_s: float = 0.0
    first_token_s: float = 0.0

    def advance(self, arriving: float, seconds: float) -> None:
        """`arriving`: requests within these seconds."""
        machine = self.machine
        self.waiting += arriving
        finished = min(self.running, seconds * min(self.running / machine.alone_s, machine.capacity_s))
        self.running -= finished
        self.done += finished
        if self.running + self.waiting < LAST:  # of a fluid there is always some left
            self.running = self.waiting = 0.0
        per_request = machine.prompt_tokens + machine.generation_tokens / 2
        room = max(0.0, min(machine.slots, machine.pool_tokens / per_request) - self.running)
        admitted = min(self.waiting, room)
        self.waiting -= admitted
        self.running += admitted
        self.admitted += admitted
        self.wait_s = self.waiting / machine.capacity_s
        self.first_token_s += admitted * self.wait_s

    def report(self, now: float, period_s: float) -> None:
        self.samples.append(self.sample(now))
        while self.samples[0].at < now - period_s:
            self.samples.popleft()

    def sample(self, now: float) -> Sample:
        machine = self.machine
        queued = self.waiting * machine.prompt_tokens
        return Sample(
            at=now,
            requests=self.waiting + self.running,
            queued_tokens=queued,
            kv_held=self.running * (machine.prompt_tokens + machine.generation_tokens / 2) / machine.pool_tokens,
            kv_wanted=queued / machine.pool_tokens,
            prompt_tokens=self.admitted * machine.prompt_tokens,
            generation_tokens=self.done * machine.generation_tokens,
            first_tokens=self.admitted,
            first_token_s=self.first_token_s,
        )


def simulate(
    settings: Autoscaling,
    rate: Callable[[float], float],
    duration_s: float,
    machine: Machine | None = None,
    step_s: float = 1.0,
) -> list[Moment]:
    """`rate(t)`: requests/s that arrive, dealt to whom has the shortest queue; what a replica that goes had, too.

    The autoscaler is asked at every step, and told of the load a few times in its look-back period.
    """
    machine = machine or Machine()
    scaler = Autoscaler(settings)
    start = settings.initial_replicas if settings.initial_replicas is not None else max(1, settings.min_replicas)
    replicas = [_Replica(machine, 0.0) for _ in range(start)]
    history, target, homeless, reported, load = [], start, 0.0, -math.inf, Load()
    for number in range(int(duration_s / step_s)):
        now = number * step_s
        ready = [replica for replica in replicas if replica.ready_at <= now]
        arriving = rate(now)
        homeless += arriving * step_s
        short = min([replica.waiting for replica in ready], default=0.0) + 1.0
        takers = sum([replica.waiting <= short for replica in ready])
        for replica in ready:
            replica.advance(homeless / takers if replica.waiting <= short else 0.0, step_s)
        homeless = 0.0 if ready else homeless
        if now >= reported + settings.look_back_period_s / REPORTS_PER_PERIOD:
            reported = now
            for replica in ready:
                replica.report(now, settings.look_back_period_s)
            load = load_of([list(r.samples) for r in ready])
        if not ready:
            load = Load(waiting=homeless)
        decision = scaler.decide(load, target, now)
        target = min(max(decision.replicas, settings.min_replicas), settings.max_replicas)
        while len(replicas) < target:
            replicas.append(_Replica(machine, now + machine.start_s))
        while len(replicas) > target:
            gone = replicas.pop()
            homeless += gone.waiting + gone.running
        wait_s = min((replica.wait_s for replica in ready), default=machine.start_s)
        needed = arriving / machine.capacity_s
        history.append(Moment(now, len(ready), target, needed, wait_s, decision.reason))
    return history

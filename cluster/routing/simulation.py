"""A pool and its router on a virtual clock: real schedulers, block pools, Fleet and policy. No model, no Ray.

What is made up: how long a step takes (CostModel), and that news of a step reach the router NEWS_S later. Requests come
from a Workload, which may answer what it is sent with a further request (the next turn of a conversation).
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from octavo.cluster.ingress.admission import Admission
from octavo.cluster.routing.fleet import Fleet, Placing
from octavo.engine.core.blocks import BlockLog, BlockPool
from octavo.engine.core.limits import Limits
from octavo.engine.core.plan import StepResult
from octavo.engine.core.prefix import Chain
from octavo.engine.core.scheduler import Scheduler
from octavo.engine.errors import CapacityError
from octavo.engine.params import SamplingParams
from octavo.engine.runner.fake import CostModel, FakeRunner
from octavo.engine.types import Request, TokenDelta

NEWS_S = 0.002
BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that comes at `at_s`, of the conversation `session`."""

    at_s: float
    prompt: tuple[int, ...]
    max_tokens: int
    session: int = 0


class Workload(Protocol):
    def arrivals(self) -> Iterable[Arrival]:
        """What comes whatever happens."""
        ...

    def after(self, arrival: Arrival, output: tuple[int, ...], now_s: float) -> Arrival | None:
        """What comes because `arrival` has been answered with `output`."""
        ...


@dataclass(frozen=True, slots=True)
class Replica:
    """What each replica is like. Times as an 8B model's on a large GPU, roughly."""

    num_blocks: int = 4096
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_model_len: int = 16384
    cost: CostModel = field(default_factory=lambda: CostModel(step_s=0.008, token_s=0.00005, kv_position_s=2e-8))


@dataclass(slots=True)
class Served:
    """One request's fate. `cached`: tokens of its prompt found in the cache."""

    arrival: Arrival
    replica: str
    predicted: int
    cached: int = 0
    ttft_s: float = 0.0
    end_s: float = 0.0


class _Engine:
    """A replica: its step ends at the time the simulation says."""

    def __init__(self, replica: Replica) -> None:
        self.pool = BlockPool(replica.num_blocks)
        self.pool.log = BlockLog()
        limits = Limits(
            block_size=BLOCK_SIZE,
            max_model_len=replica.max_model_len,
            max_num_seqs=replica.max_num_seqs,
            max_num_batched_tokens=replica.max_num_batched_tokens,
            vocab_size=1 << 20,
        )
        self.scheduler = Scheduler(limits, self.pool)
        self._runner = FakeRunner(replica.num_blocks, BLOCK_SIZE, cost=replica.cost)
        self.running: StepResult | None = None

    def begin(self) -> float | None:
        """Start a step if there is one to make; returns its seconds."""
        plan = self.scheduler.schedule() if self.running is None else None
        if plan is None:
            return None
        self.running = self._runner.execute(plan)
        return self.running.seconds

    def end(self) -> list[TokenDelta]:
        assert self.running is not None
        result, self.running = self.running, None
        return self.scheduler.commit(result)


class Simulation:
    """`fleets` are fresh, one per ingress: requests go to the ingresses in turn. Each gets `num_replicas` replicas.

    max_queue_wait_s: as in an ingress's limits. refused: arrivals that were turned away for it.
    """

    def __init__(
        self,
        fleets: Sequence[Fleet],
        num_replicas: int,
        replica: Replica | None = None,
        max_queue_wait_s: float | None = None,
    ) -> None:
        self.refused: list[Arrival] = []
        self._max_queue_wait_s = max_queue_wait_s
        self._fleets = fleets
        self._turns = itertools.cycle(fleets)
        self._engines = {f"replica-{i}": _Engine(replica or Replica()) for i in range(num_replicas)}
        for fleet in fleets:
            fleet.set_replicas(dict.fromkeys(self._engines, True))
        self._queue: list[tuple[float, int, str, object]] = []
        self._order = itertools.count()
        self._live: dict[str, tuple[Served, Placing, Fleet, list[int]]] = {}

    def run(self, workload: Workload) -> list[Served]:
        """All requests of `workload`, in the order of their ends."""
        done: list[Served] = []
        for arrival in workload.arrivals():
            self._at(arrival.at_s, "arrival", arrival)
        while self._queue:
            now, _, kind, what = heapq.heappop(self._queue)
            if kind == "arrival":
                assert isinstance(what, Arrival)
                self._arrive(what, now)
            elif kind == "step":
                assert isinstance(what, str)
                for served, output in self._step(what, now):
                    done.append(served)
                    following = workload.after(served.arrival, output, now)
                    if following is not None:
                        self._at(following.at_s, "arrival", following)
            else:
                assert callable(what)
                what()
        assert not self._live, f"{len(self._live)} requests were never finished"
        return done

    def _at(self, time_s: float, kind: str, what: object) -> None:
        heapq.heappush(self._queue, (time_s, next(self._order), kind, what))

    def _arrive(self, arrival: Arrival, now: float) -> None:
        fleet = next(self._turns)
        try:
            Admission(self._max_queue_wait_s, fleet.expected_wait_s).check()
        except CapacityError:
            self.refused.append(arrival)
            return
        placing = Placing(len(arrival.prompt), Chain(arrival.prompt, BLOCK_SIZE))
        name = fleet.place(placing)[0]
        request_id = str(next(self._order))
        params = SamplingParams(max_tokens=arrival.max_tokens, ignore_eos=True, temperature=0.0, seed=0)
        self._engines[name].scheduler.add(Request(request_id, arrival.prompt, params))
        self._live[request_id] = Served(arrival, name, placing.predicted), placing, fleet, []
        self._begin(name, now)

    def _begin(self, name: str, now: float) -> None:
        seconds = self._engines[name].begin()
        if seconds is not None:
            self._at(now + seconds, "step", name)

    def _step(self, name: str, now: float) -> list[tuple[Served, tuple[int, ...]]]:
        engine = self._engines[name]
        ended = []
        for delta in engine.end():
            served, placing, fleet, output = self._live[delta.request_id]
            if not output:
                served.cached, served.ttft_s = delta.num_cached_tokens, now - served.arrival.at_s
                self._at(now + NEWS_S, "news", partial(fleet.started, placing, served.cached))
            output.extend(delta.token_ids)
            if delta.finish_reason is not None:
                served.end_s = now
                del self._live[delta.request_id]
                ended.append((served, tuple(output)))
        assert engine.pool.log is not None
        changes, stats = engine.pool.log.drain(), engine.scheduler.stats()

        def tell() -> None:
            for fleet in self._fleets:
                fleet.change(name, changes)
                fleet.observe(name, stats, now)

        self._at(now + NEWS_S, "news", tell)
        self._begin(name, now)
        return ended

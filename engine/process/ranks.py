"""Ranks: several processes that execute one plan per step, as the `Process` of an EngineCore. The driver's side.

Knows the channel and who is late. Does not know how the processes were started: a Launcher does (actors.py for Ray).

A rank is lost when its connection ends, when it says that it cannot go on, when its pulse stops, or when a step takes
too long. One lost rank ends the replica: the first that failed is named, since the others then fail because of it, and
all processes are ended before anybody is told.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from octavo.engine.build import Phases
from octavo.engine.config import EngineConfig
from octavo.engine.core.plan import StepPlan, StepResult, TokenMasks
from octavo.engine.errors import ConfigError, RankLost
from octavo.engine.parallel.layout import Layout
from octavo.engine.process import wire
from octavo.engine.process.channel import Hub
from octavo.engine.process.rank import STARTING_S, RankSpec, rank_name
from octavo.engine.types import EngineInfo, RankStatus

log = logging.getLogger(__name__)
M = TypeVar("M")

# After the first sign of a loss: how long to listen for who failed first, and to ask who started it for the cause.
SETTLE_S = 0.15
CAUSE_S = 0.3
LOOK_S = 0.25  # between looks at who is late
STOP_S = 1.0  # for a rank to end by itself, its step in progress included
KEEP_S = 1.0  # the same, while nobody waits for a result


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long things may take, in seconds. A replica that misses one has lost a rank.

    call: until a rank's process is there and calls. hang: a rank without a pulse. step: counted from the end of
    the step before.
    """

    call_s: float = 120.0
    hang_s: float = 4.0
    step_s: float = 300.0


class Launcher(Protocol):
    """Starts the processes and ends them."""

    @property
    def host(self) -> str:
        """The address to listen on, which all ranks reach."""

    def start(self, specs: Sequence[RankSpec]) -> None:
        """Start one process per spec, all at once; returns before they run. Raises ConfigError if there is no room."""

    def cause(self, rank: int, timeout_s: float) -> str | None:
        """Why the rank's process ended, as far as that is known; None if it runs or nobody knows."""

    def where(self, node: str) -> str:
        """What people call a node."""

    def end(self, called: Sequence[tuple[str, int]]) -> None:
        """End all processes for sure, those that are stopped too. called: (node, pid) of those that did."""

    def close(self) -> None:
        """Give back what else the launcher holds. Called once, after `end`."""


_NO_BEAT = wire.Beat(0, 0.0, False)


@dataclass(slots=True)
class _Rank:
    """What the driver knows of one rank."""

    name: str
    pid: int = 0
    node: str = ""
    gpu: int | None = None
    seen: float = 0.0
    beat: wire.Beat = _NO_BEAT
    failed: wire.Failed | None = None
    gone: bool = False


@dataclass(frozen=True, slots=True)
class _Fault:
    """Why a rank is lost. weight: how likely it is the cause and not a consequence; the smallest is named."""

    weight: int
    rank: int
    why: str


class Ranks:
    """A `Process`. `launch`, `collect` and `check` from one thread; `close` from any.

    Raises, on construction, ConfigError as a rank did, or RankLost. `phases`: of the start-up, the slowest rank's.
    """

    def __init__(
        self,
        config: EngineConfig,
        layout: Layout,
        launcher: Launcher,
        deadlines: Deadlines,
        phases: Phases,
        threads: int | None = None,
    ) -> None:
        self._layout, self._launcher, self._deadlines = layout, launcher, deadlines
        self._drawing = [layout.rank(layout.pp - 1, tp_rank) for tp_rank in range(layout.tp)]  # who draws tokens
        self._ranks = [_Rank(rank_name(i, layout)) for i in range(layout.size)]
        token = secrets.token_hex(16)
        self._hub = Hub(launcher.host, layout.size, token)
        self._results: deque[StepResult] = deque()
        self._mail: list[tuple[int, wire.ToDriver]] = []  # of the start-up
        self._phases: dict[str, list[float]] = {}  # seconds of the ranks that ended one
        self._in_flight = 0
        self._since = 0.0  # when the oldest step in flight became the oldest
        self._looked = self._checked = time.monotonic()
        self._hang_s = STARTING_S
        self._lost: RankLost | None = None
        self._closed = threading.Event()
        self._lock = threading.RLock()  # of everything above; held while waiting for what comes
        specs = [
            RankSpec(
                rank,
                layout,
                config,
                self._hub.address,
                token,
                threads,
                deadlines.hang_s,
                step_timeout_s=deadlines.step_s,
            )
            for rank in range(layout.size)
        ]
        try:
            launcher.start(specs)
            self.info = self._start(config, phases)
        except BaseException:
            self.close()
            raise
        self._keeper = threading.Thread(target=self._keep, name="octavo-ranks", daemon=True)
        self._keeper.start()

    # ── the Process ───────────────────────────────────────────────────────────────────────────────────────────────

    def launch(self, plan: StepPlan) -> None:
        if self._in_flight == 0:
            self._since = time.monotonic()
        self._in_flight += 1
        if self._lost is None:
            self._hub.broadcast(wire.Step(plan))

    def constrain(self, masks: TokenMasks) -> None:
        if self._lost is None:
            self._hub.broadcast(wire.Masks(masks), self._drawing)

    def collect(self) -> StepResult:
        while not self._results:
            with self._lock:
                self._look(LOOK_S)
        self._in_flight -= 1
        self._since = time.monotonic()
        return self._results.popleft()

    def check(self) -> None:
        with self._lock:
            self._look(0.0)

    def ranks(self) -> tuple[RankStatus, ...]:
        now = time.monotonic()
        return tuple(
            RankStatus(i, *self._layout.place(i), rank.pid, rank.node, rank.gpu, max(0.0, now - rank.seen))
            for i, rank in enumerate(self._ranks)
        )

    def close(self) -> None:
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
            self._hub.broadcast(wire.Stop())
            deadline = time.monotonic() + STOP_S
            while not all(rank.gone for rank in self._ranks if rank.pid) and time.monotonic() < deadline:
                self._take(self._hub.poll(LOOK_S))
            self._end_all()
            self._launcher.close()

    # ── the start ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _start(self, config: EngineConfig, phases: Phases) -> EngineInfo:
        everyone = range(self._layout.size)
        with phases.phase("start ranks"):
            self._await_calls()
        self._hub.broadcast(wire.Host(), [0])
        (hosting,) = self._gather(wire.Hosting, [0], phases)
        nodes = [rank.node for rank in self._ranks]
        for node in dict.fromkeys(nodes):
            begin = wire.Begin((hosting.host, hosting.port), nodes.count(node))
            self._hub.broadcast(begin, [rank for rank in everyone if nodes[rank] == node])
        infos = [built.info for built in self._gather(wire.Built, everyone, phases)]
        num_blocks = min(info.num_blocks for info in infos)
        length = min(info.max_model_len for info in infos)
        if config.max_model_len is None:
            length = min(length, num_blocks * config.block_size)
        self._hub.broadcast(wire.Allocate(num_blocks, length))
        self._gather(wire.Ready, everyone, phases)
        self._hang_s = self._deadlines.hang_s
        return replace(infos[0], num_blocks=num_blocks, max_model_len=length)

    def _await_calls(self) -> None:
        """Until every rank has said Hello."""
        deadline = time.monotonic() + self._deadlines.call_s
        while missing := [i for i, rank in enumerate(self._ranks) if not rank.pid]:
            self._look(LOOK_S)
            for i in missing:
                cause = None if self._ranks[i].pid else self._launcher.cause(i, 0.0)
                if cause is not None:
                    self._lose([_Fault(0, i, cause)])
            if time.monotonic() > deadline:
                others = f" (nor have {len(missing) - 1} others)" if len(missing) > 1 else ""
                why = f"it has not called within {self._deadlines.call_s:g} s of its start{others}"
                self._lose([_Fault(0, missing[0], why)])

    def _gather(self, kind: type[M], ranks: Sequence[int], phases: Phases) -> list[M]:
        """One message of `kind` from each of `ranks`, in their order; phases are reported when all ranks ended them."""
        found: dict[int, M] = {}
        while len(found) < len(ranks):
            self._look(LOOK_S)
            for rank, message in self._mail:
                if isinstance(message, wire.Phase):
                    self._phase(message, phases)
                elif isinstance(message, kind):
                    found[rank] = message
            self._mail.clear()
        return [found[rank] for rank in ranks]

    def _phase(self, message: wire.Phase, phases: Phases) -> None:
        seconds = self._phases.setdefault(message.name, [])
        seconds.append(message.seconds)
        if len(seconds) == self._layout.size:
            phases.end(message.name, max(seconds))

    # ── who is late ───────────────────────────────────────────────────────────────────────────────────────────────

    def _look(self, timeout_s: float) -> None:
        """Take in what came, waiting at most timeout_s. Raises RankLost or, from a rank that starts, ConfigError."""
        if self._lost is not None:
            raise self._lost
        if self._closed.is_set():
            raise RankLost("The ranks were stopped.")
        before = time.monotonic()
        if before - self._looked > 2 * self._deadlines.hang_s / 3:  # nobody looked: what came meanwhile is not late
            for rank in self._ranks:
                rank.seen = max(rank.seen, before)
        faults = self._take(self._hub.poll(timeout_s))
        self._looked = now = time.monotonic()
        if (
            not faults and now - self._checked > LOOK_S / 2
        ):  # also while results come: not every rank has a part in them
            self._checked = now
            faults = self._late(now)
        if faults:
            self._lose(faults)

    def _take(self, came: list[tuple[int, wire.ToDriver | None]]) -> list[_Fault]:
        now, faults = time.monotonic(), []
        for number, message in came:
            rank = self._ranks[number]
            rank.seen = now
            if isinstance(message, wire.Done):
                self._results.append(message.result)
            elif isinstance(message, wire.Beat):
                rank.beat = message
            elif message is None:
                rank.gone = True
                if rank.failed is None:
                    faults.append(_Fault(0, number, "its process ended"))
            elif isinstance(message, wire.Hello):
                rank.pid, rank.node, rank.gpu = message.pid, message.node, message.gpu
            elif isinstance(message, wire.Failed):
                rank.failed = message
                faults.append(_Fault(2 if message.kind == "lost" else 1, number, message.message))
            else:
                self._mail.append((number, message))
        return faults

    def _late(self, now: float) -> list[_Fault]:
        hang_s, step_s = self._hang_s, self._deadlines.step_s
        faults = [
            _Fault(0, number, f"it has given no sign of life for {now - rank.seen:.1f} s")
            for number, rank in enumerate(self._ranks)
            if rank.pid and now - rank.seen > hang_s
        ]
        if not faults and self._in_flight and now - self._since > step_s:
            # Those that wait for others are not to blame, nor those that are ahead.
            behind = min(range(len(self._ranks)), key=lambda i: (self._ranks[i].beat.waits, self._ranks[i].beat.steps))
            faults.append(_Fault(0, behind, f"a step has not ended within {step_s:g} s"))
        return faults

    def _lose(self, faults: list[_Fault]) -> None:
        """The replica cannot go on: find out who failed first, end all, raise."""
        deadline = time.monotonic() + SETTLE_S
        while min(fault.weight for fault in faults) > 0 and (left := deadline - time.monotonic()) > 0:
            faults += self._take(self._hub.poll(left))
        first = min(faults, key=lambda fault: fault.weight)  # of equals the earliest
        rank = self._ranks[first.rank]
        if rank.failed is not None and rank.failed.kind == "config":
            self._end_all()
            raise ConfigError(rank.failed.message)
        why = first.why
        if rank.gone:
            why = self._launcher.cause(first.rank, CAUSE_S) or why
        place = f" on {self._launcher.where(rank.node)}, pid {rank.pid}," if rank.pid else ""
        self._lost = RankLost(f"{rank.name.capitalize()}{place} was lost: {why.rstrip('.')}.")
        log.error("%s", self._lost)
        self._end_all()
        raise self._lost

    def _end_all(self) -> None:
        """Ranks end when their connection does; whoever does not is killed."""
        self._hub.close()
        self._launcher.end([(rank.node, rank.pid) for rank in self._ranks if rank.pid])
        for rank in self._ranks:
            rank.gone = True

    def _keep(self) -> None:
        """While nobody computes, somebody must hear the pulses."""
        while not self._closed.wait(KEEP_S) and self._lost is None:
            if self._lock.acquire(blocking=False):
                try:
                    self._look(0.0)
                except RankLost:
                    return  # whoever comes next gets it
                finally:
                    self._lock.release()

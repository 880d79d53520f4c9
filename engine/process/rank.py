"""One rank of a replica: what runs in its process, from the call to the driver to the last step.

Knows the channel and what a rank is built of, by two calls. Does not know who started it, nor other ranks.

Two threads: the one that builds the model and executes plans, and the pulse, which tells the driver and the watchdog
that the process lives, and ends it when the driver is gone. A step that hangs does not stop the pulse; a process that
is stopped does. Where a device computes, a third waits for its results, while the first launches the next step.
"""

from __future__ import annotations

import logging
import os
import queue
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from octavo.engine.build import Phases
from octavo.engine.config import EngineConfig
from octavo.engine.core.plan import Computed, MaskSource, Pending, StepPlan, TokenMasks
from octavo.engine.errors import ConfigError, RankLost
from octavo.engine.parallel.layout import Layout
from octavo.engine.process import wire
from octavo.engine.process.channel import ChannelClosed, Line, dial
from octavo.engine.process.inproc import Executes
from octavo.engine.process.watchdog import BEAT_S, STARTING_S, Watchdog
from octavo.engine.types import EngineInfo

if TYPE_CHECKING:
    from octavo.engine.runner.fake import FakeRunner

log = logging.getLogger(__name__)

LAST_STEPS_S = 2.0


@dataclass(frozen=True, slots=True)
class RankSpec:
    """What a rank needs to know to call the driver and to build its part.

    driver: host and port. token: proves that the rank belongs to this replica. threads: of the CPU, None = torch's
    default. hang_timeout_s: how long its process may give no sign of life. step_timeout_s: of one collective.
    """

    rank: int
    layout: Layout
    config: EngineConfig
    driver: tuple[str, int]
    token: str
    threads: int | None = None
    hang_timeout_s: float = 4.0
    step_timeout_s: float = 300.0

    @property
    def name(self) -> str:
        return rank_name(self.rank, self.layout)


def rank_name(rank: int, layout: Layout) -> str:
    """As logs, errors and Ray's dashboard show it: `rank 1/4 (stage 0, tp 1)`."""
    stage, tp_rank = layout.place(rank)
    return f"rank {rank}/{layout.size} (stage {stage}, tp {tp_rank})"


class Part(Protocol):
    """A rank's part of the engine, loaded."""

    @property
    def info(self) -> EngineInfo:
        """num_blocks and max_model_len: what this rank alone would have room for."""

    def allocate(self, num_blocks: int, max_model_len: int) -> Executes:
        """The KV pool, and with it the runner."""

    def close(self) -> None:
        """Cut the connections to other ranks. From any thread."""


class Builder(Protocol):
    """How a rank gets its part."""

    def host(self, address: str, spec: RankSpec) -> tuple[str, int]:
        """On rank 0: make a place where the ranks' collectives find one another, at `address` of this node, that lasts
        as long as the builder. Returns host and port."""

    def build(self, spec: RankSpec, begin: wire.Begin, phases: Phases) -> Part:
        """Connect to the other ranks and load this one's weights. Raises ConfigError, RankLost."""


End = Callable[[int], object]


def run_rank(spec: RankSpec, node: str, gpu: int | None = None, end: End = os._exit, watched: bool = True) -> None:
    """Be the rank, until the driver says stop or is gone. node: where this is, in the driver's terms. gpu: the number
    of its GPU on that node.

    end: called, with an exit code, when the driver is gone: nothing else could stop a step that hangs. watched: start a
    Watchdog for this process.
    """
    line = dial(spec.driver, wire.Hello(spec.token, spec.rank, os.getpid(), node, gpu))
    pulse = Pulse(line, spec.hang_timeout_s, end, watched)
    pulse.start()
    try:
        _live(spec, line, pulse)
    except ChannelClosed:
        end(1)
    except Exception as error:
        log.error("%s ends: %s", spec.name, error, exc_info=not isinstance(error, (ConfigError, RankLost)))
        _report(line, error)
    finally:
        pulse.stop()
        line.close()


def _live(spec: RankSpec, line: Line, pulse: Pulse) -> None:
    phases = Phases(lambda name, seconds: line.send(wire.Phase(name, seconds)))
    builder = _builder(spec.config, phases)
    message = line.receive()
    if isinstance(message, wire.Host):
        line.send(wire.Hosting(*builder.host(line.own_address, spec)))
        message = line.receive()
    if isinstance(message, wire.Stop):
        return
    assert isinstance(message, wire.Begin), message
    part = builder.build(spec, message, phases)
    try:
        line.send(wire.Built(part.info))
        message = line.receive()
        if isinstance(message, wire.Stop):
            return
        assert isinstance(message, wire.Allocate), message
        with phases.phase("KV cache"):
            runner = part.allocate(message.num_blocks, message.max_model_len)
        pulse.ready()
        line.send(wire.Ready())
        stage, tp_rank = spec.layout.place(spec.rank)
        _execute_plans(line, pulse, runner, answers=stage == spec.layout.pp - 1 and tp_rank == 0)
    finally:
        part.close()


def _execute_plans(line: Line, pulse: Pulse, runner: Executes, answers: bool) -> None:
    """Until Stop. answers: this rank's results are the replica's; the others' are known to be the same, or empty."""
    plans = _Plans(line)
    waiter = _Waiter(line, pulse, answers)
    try:
        while (plan := plans.next()) is not None:
            pulse.begin_step()
            waiter.take(runner.execute(plan, plans))
    finally:
        waiter.close()


class _Waiter:
    """Waits for steps in their order, and tells the driver what they brought. A step that is done at once is told at
    once; others on a thread, which there is none of before."""

    def __init__(self, line: Line, pulse: Pulse, answers: bool) -> None:
        self._line, self._pulse, self._answers = line, pulse, answers
        self._begun: queue.SimpleQueue[Pending | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def take(self, pending: Pending) -> None:
        """Raises what has failed an earlier step."""
        if self._error is not None:
            raise self._error
        if self._thread is None and isinstance(pending, Computed):
            self._tell(pending)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="octavo-results", daemon=True)
            self._thread.start()
        self._begun.put(pending)

    def close(self) -> None:
        """Steps that are under way are waited for, but not for long: a device that hangs must not keep this thread from
        saying why it ends."""
        if self._thread is not None:
            self._begun.put(None)
            self._thread.join(LAST_STEPS_S)

    def _run(self) -> None:
        while (pending := self._begun.get()) is not None:
            try:
                self._tell(pending)
            except Exception as error:
                self._error = error
                if not isinstance(error, ChannelClosed):
                    _tell_of(self._line, error)
                return

    def _tell(self, pending: Pending) -> None:
        result = pending.wait()
        self._pulse.end_step()
        if self._answers:
            self._line.send(wire.Done(result))


class _Plans:
    """Plans as they come, and the masks of the one that is computed: a MaskSource."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._passed: deque[wire.ToRank] = deque()  # what came before the masks that were waited for

    def next(self) -> StepPlan | None:
        """None: no more."""
        while True:
            message = self._passed.popleft() if self._passed else self._line.receive()
            if not isinstance(message, wire.Masks):  # masks that nobody has asked for are of a step that failed
                return message.plan if isinstance(message, wire.Step) else None

    def take(self, step_id: int) -> TokenMasks:
        while not isinstance(message := self._line.receive(), wire.Masks) or message.masks.step_id < step_id:
            if isinstance(message, wire.Stop):
                raise ChannelClosed("the driver stopped")
            self._passed.append(message)
        return message.masks


def _report(line: Line, error: Exception) -> None:
    """Tell the driver why, and wait until it has heard: then it ends this process."""
    try:
        _tell_of(line, error)
        while not isinstance(line.receive(), wire.Stop):
            pass
    except ChannelClosed:
        return


def _tell_of(line: Line, error: Exception) -> None:
    kind: Literal["config", "lost", "error"] = "error"
    message = f"{type(error).__name__}: {error}"
    if isinstance(error, (ConfigError, RankLost)):
        kind, message = ("config" if isinstance(error, ConfigError) else "lost"), str(error)
    line.send(wire.Failed(kind, message))


def _builder(config: EngineConfig, phases: Phases) -> Builder:
    if config.is_fake:
        return FakeBuilder()
    with phases.phase("import torch"):
        from octavo.engine.runner.build import RankBuilder
    return RankBuilder()


class Pulse:
    """The rank's sign of life, from a thread of its own."""

    def __init__(self, line: Line, hang_timeout_s: float, end: End, watched: bool) -> None:
        self._line, self._end, self._hang_timeout_s = line, end, hang_timeout_s
        self._watchdog = Watchdog(STARTING_S) if watched else None
        self._worker = threading.get_ident()
        self._steps, self._began = 0, 0.0
        self._under_way, self._lock = 0, threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="octavo-pulse", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def ready(self) -> None:
        """The rank has started: from now on silence counts. The driver should notice it first, and say so."""
        if self._watchdog is not None:
            self._watchdog.allow(self._hang_timeout_s + 1)

    def begin_step(self) -> None:
        with self._lock:
            self._under_way += 1
            self._began = self._began or time.monotonic()

    def end_step(self) -> None:
        """The oldest one."""
        with self._lock:
            self._under_way -= 1
            self._began = time.monotonic() if self._under_way else 0.0
            self._steps += 1

    def stop(self) -> None:
        self._stopping.set()
        if self._watchdog is not None:
            self._thread.join()
            self._watchdog.close()

    def _run(self) -> None:
        gone = select.poll()
        gone.register(self._line.socket, getattr(select, "POLLRDHUP", select.POLLHUP) | select.POLLHUP | select.POLLERR)
        while not self._stopping.is_set():
            try:
                self._line.send(self._beat())
            except ChannelClosed:
                break
            if self._watchdog is not None:
                self._watchdog.beat()
            if gone.poll(BEAT_S * 1000):
                break
        if not self._stopping.is_set():
            self._end(1)

    def _beat(self) -> wire.Beat:
        began = self._began
        busy_s = time.monotonic() - began if began else 0.0
        return wire.Beat(self._steps, busy_s, busy_s > 1.0 and self._waits())

    def _waits(self) -> bool:
        """Whether the worker stands in a call to other ranks."""
        frame = sys._current_frames().get(self._worker)
        while frame is not None:
            if frame.f_globals.get("__name__") == "octavo.engine.parallel.connect":
                return True
            frame = frame.f_back
        return False


class FakeBuilder:
    """Ranks without a model: each executes every plan on a FakeRunner. No torch, no collectives."""

    def host(self, address: str, spec: RankSpec) -> tuple[str, int]:
        return address, 0

    def build(self, spec: RankSpec, begin: wire.Begin, phases: Phases) -> Part:
        return FakePart(spec)


class FakePart:
    def __init__(self, spec: RankSpec) -> None:
        from octavo.engine.build import fake_info

        self._spec, self.info = spec, fake_info(spec.config)

    def allocate(self, num_blocks: int, max_model_len: int) -> Executes:
        from octavo.engine.build import fake_runner

        layout = self._spec.layout
        draws = layout.place(self._spec.rank)[0] == layout.pp - 1
        return _Paced(fake_runner(self._spec.config, self.info, layout.pp), draws)

    def close(self) -> None:
        """There is nothing to close."""


class _Paced:
    """Takes as long for a step as the fake says it does."""

    def __init__(self, runner: FakeRunner, draws: bool) -> None:
        self._runner, self._draws = runner, draws

    def execute(self, plan: StepPlan, masks: MaskSource) -> Computed:
        result = self._runner.execute(plan, masks if self._draws else None)
        time.sleep(result.seconds)
        return Computed(result)

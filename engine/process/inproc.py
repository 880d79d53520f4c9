"""InProcess: one rank in this process, on a thread of its own.

The thread lets the host plan step N+1 while the rank computes N: torch and the native ops release the GIL. Where a
device computes, the thread launches N+1 behind N, and whoever collects waits for the device.

The rank must be built on its thread too, and nothing else in the process should compute with torch. OpenMP gives every
thread that starts parallel work its own workers, and once these are more than the cores, libgomp's workers go to sleep
between operations instead of spinning for a moment: a decode step then took 24 ms instead of 15 on two cores.
"""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from octavo.engine.core.plan import MaskSource, Pending, StepPlan, StepResult, TokenMasks
from octavo.engine.errors import OctavoError, StepError
from octavo.engine.process.masks import MaskBox
from octavo.engine.types import RankStatus


class Executes(Protocol):
    """A rank's runner."""

    def execute(self, plan: StepPlan, masks: MaskSource) -> Pending:
        """Begin a step, whose masks are to be had from `masks` at some time. Steps are begun in order, on one thread,
        and waited for in order. Any exception fails the step, and that step alone."""


def rank_thread() -> ThreadPoolExecutor:
    """The thread to build a rank on, and then to give to InProcess."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="octavo-rank0")


class InProcess:
    """A `Process` (see core/engine.py) of one rank, whose runner was built on `thread`."""

    def __init__(self, thread: ThreadPoolExecutor, runner: Executes) -> None:
        self._runner = runner
        self._thread = thread
        self._launched: deque[Future[Pending]] = deque()
        self._masks = MaskBox()

    def launch(self, plan: StepPlan) -> None:
        self._launched.append(self._thread.submit(self._runner.execute, plan, self._masks))

    def constrain(self, masks: TokenMasks) -> None:
        self._masks.put(masks)

    def collect(self) -> StepResult:
        try:
            return self._launched.popleft().result().wait()
        except OctavoError:
            raise
        except Exception as error:
            raise StepError(f"{type(error).__name__}: {error}") from error

    def check(self) -> None:
        """What could be lost is this process."""

    def ranks(self) -> tuple[RankStatus, ...]:
        return (RankStatus(rank=0, stage=0, tp_rank=0, pid=os.getpid()),)

    def close(self) -> None:
        self._masks.close()
        self._thread.shutdown(wait=True, cancel_futures=True)

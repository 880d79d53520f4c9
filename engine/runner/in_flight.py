"""Results on their way to the host: a step's, and a tensor's.

Knows CUDA events. Does not know what the results say.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from octavo.engine.core.plan import RowResult, StepResult
from octavo.engine.errors import RankLost
from octavo.engine.runner.device import Timed


class HostCopies:
    """Tensors on their way to the host. On CUDA the copies are queued behind what makes them, into pinned memory."""

    def __init__(self, tensors: tuple[torch.Tensor, ...]) -> None:
        self._done: torch.cuda.Event | None = None
        if tensors[0].device.type != "cuda":
            self._host = tensors
            return
        self._host = tuple(torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in tensors)
        for host, device in zip(self._host, tensors, strict=True):
            host.copy_(device, non_blocking=True)
        self._done = torch.cuda.Event()
        self._done.record(torch.cuda.current_stream(tensors[0].device))

    def wait(self) -> tuple[torch.Tensor, ...]:
        if self._done is not None:
            self._done.synchronize()
        return self._host


class InFlight:
    """A step that a device is at (see `octavo.engine.core.plan.Pending`). finish: waits for what it needs, and makes
    the rows' results of it."""

    def __init__(self, step_id: int, finish: Callable[[], tuple[RowResult, ...]], timed: Timed) -> None:
        self._step_id, self._finish, self._timed = step_id, finish, timed

    def wait(self) -> StepResult:
        """Raises RankLost if the device has failed: what it was given after that failed with it."""
        try:
            rows = self._finish()
            return StepResult(self._step_id, rows, *self._timed.read())
        except RuntimeError as error:
            raise RankLost(f"The device has failed: {error}") from error

"""What a runner asks of a device besides ops: whether it is the host, and the times of its steps.

Work is queued on the device in order, so nothing here waits but `Timed.read`. A CPU does what it is asked at once.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import torch


class Timed(Protocol):
    """A step that was timed."""

    def read(self) -> tuple[float, float]:
        """Waits for its end. (seconds it took, seconds since the end of the step before)."""


class Clock(Protocol):
    """Times a rank's steps; each is begun, launched and ended, in this order."""

    def begin(self) -> None:
        """The host begins with the step."""

    def launch(self) -> None:
        """The host has prepared it: what is queued from now on is the step."""

    def end(self) -> Timed:
        """All of it is queued."""


def is_host(device: torch.device) -> bool:
    """Whether what lies there lies in the host's memory, and is computed while the host waits."""
    return device.type != "cuda"


def make_clock(device: torch.device) -> Clock:
    return HostClock() if is_host(device) else DeviceClock()


@dataclass(frozen=True, slots=True)
class Measured:
    seconds: float
    gap_s: float

    def read(self) -> tuple[float, float]:
        return self.seconds, self.gap_s


class HostClock:
    """Where the host computes: what it does to prepare a step is part of it."""

    def __init__(self) -> None:
        self._began = self._ended = time.perf_counter()

    def begin(self) -> None:
        self._began = time.perf_counter()

    def launch(self) -> None:
        """A part of the step."""

    def end(self) -> Measured:
        gap_s, self._ended = self._began - self._ended, time.perf_counter()
        return Measured(self._ended - self._began, gap_s)


class DeviceClock:
    """By CUDA events. While the device is busy, what the host does to prepare a step costs nothing and is not seen."""

    def __init__(self) -> None:
        self._ended: torch.cuda.Event | None = None
        self._launched: torch.cuda.Event | None = None

    def begin(self) -> None:
        """Not the device's affair."""

    def launch(self) -> None:
        self._launched = _recorded()

    def end(self) -> Timed:
        assert self._launched is not None, "ended without a launch"
        before, self._ended = self._ended, _recorded()
        return _Events(before, self._launched, self._ended)


@dataclass(frozen=True, slots=True)
class _Events:
    before: torch.cuda.Event | None  # the end of the step before
    launched: torch.cuda.Event
    ended: torch.cuda.Event

    def read(self) -> tuple[float, float]:
        self.ended.synchronize()
        gap_ms = 0.0 if self.before is None else self.before.elapsed_time(self.launched)
        return self.launched.elapsed_time(self.ended) / 1e3, gap_ms / 1e3


def _recorded() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event

"""Reads weights ahead of who takes them, on several threads: from the disk, and on to the device.

Knows files, bytes and devices. Which slices will be wanted is asked for; what becomes of a tensor is not known.

On a CPU a slice that was read is a view of its mapped file, whose bytes the system has in memory by then: nothing is
copied, nothing is kept twice. On another device it is there already: it went through `staging`.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch

from octavo.engine.layers.weight import Source
from octavo.engine.loader.file_tensor import Arrival, FileTensor, InFile, OpenFile, Run
from octavo.engine.loader.staging import Sent, Staging

# Bytes that are read or being read, and not taken yet: enough to keep a disk busy while the largest tensor is taken.
AHEAD = 512 << 20
SEGMENT = 16 << 20  # of one job
SCRATCH = 256 << 10  # stays in a core's cache
BUFFERS = 2  # of a thread: one is read into while the other is on its way to the device
HOST_THREADS, DEVICE_THREADS = 2, 4

Wanted = Callable[[str, Source], Sequence[Source]]


def read_ahead(
    weights: Iterable[tuple[str, Source]], wanted: Wanted, staging: Staging | None, ahead: int = AHEAD
) -> Generator[tuple[str, Source]]:
    """`weights` as they are, but read ahead, in their order, as far as `ahead` bytes.

    wanted: which parts of a weight will be read, of what is in a file; others can be, later. staging: None = the device
    is the CPU. An error of a reading thread is raised by whoever reads that slice; one of `weights` when it is its
    turn. The threads end with the generator, that is, when it is closed.
    """
    reading: Reading = _OnHost() if staging is None else _OnDevice(staging)
    items, failure = iter(weights), None
    queue: deque[tuple[str, Source, int]] = deque()
    try:
        while True:
            while items is not None and (not queue or sum(size for *_, size in queue) < ahead):
                try:
                    name, source = next(items)
                except StopIteration:
                    items = None
                except Exception as error:  # of a file's format: whoever takes the tensors before it may find worse
                    items, failure = None, error
                else:
                    queue.append((name, *_expected(source, wanted(name, source), reading)))
            if not queue:
                break
            name, source, _ = queue[0]
            yield name, source
            del source  # with what has arrived of it
            queue.popleft()
        if failure is not None:
            raise failure
    finally:
        queue.clear()
        reading.close()


def _expected(source: Source, wanted: Sequence[Source], reading: Reading) -> tuple[Source, int]:
    """The source with what is wanted of it on its way, and how many bytes that is."""
    if not isinstance(source, InFile):
        return source, source.nbytes if isinstance(source, torch.Tensor) else 0
    slices = dict.fromkeys(part for one in wanted if isinstance(one, InFile) for part in one.slices())
    arrivals = {part: reading.fetch(part) for part in slices}
    return source.expecting(arrivals), sum(part.kept_nbytes for part in slices)


class Reading(Protocol):
    def fetch(self, wanted: FileTensor) -> Arrival:
        """Have a slice read, after all that were asked for before."""
        ...

    def close(self) -> None:
        """End the threads; what they have not begun is not read."""
        ...


class _OnHost:
    """Every byte is read once by a thread that keeps none, so that the mapped file is in memory when it is used. A disk
    gets large reads in order, instead of one per page that is missing; and what cannot be read is an error, where a
    mapping knows only how to end the process."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(HOST_THREADS, "read-weights")
        self._own = threading.local()

    def fetch(self, wanted: FileTensor) -> Arrival:
        parts = (part for run in wanted.runs() for part in run.split(SEGMENT))
        return _Touched(wanted, [self._pool.submit(self._touch, wanted.file, part) for part in parts])

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _touch(self, file: OpenFile, run: Run) -> None:
        run.touch(file, _scratch(self._own))


@dataclass(frozen=True, slots=True)
class _Touched:
    wanted: FileTensor
    jobs: Sequence[Future[None]]

    def wait(self) -> torch.Tensor:
        for job in self.jobs:
            job.result()
        return self.wanted.read()


class _OnDevice:
    """A thread reads into one of its buffers, asks for the copy, and goes on with the other buffer."""

    def __init__(self, staging: Staging) -> None:
        self._staging = staging
        self._pool = ThreadPoolExecutor(DEVICE_THREADS, "read-weights")
        self._own = threading.local()

    def fetch(self, wanted: FileTensor) -> Arrival:
        parts = [part for run in wanted.runs() for part in run.split(SEGMENT)]
        raw = self._staging.empty(wanted.kept_nbytes)
        places = raw.split([part.nbytes for part in parts]) if parts else ()
        jobs = [self._pool.submit(self._send, wanted.file, part, out) for part, out in zip(parts, places, strict=True)]
        return _OnItsWay(wanted, raw, jobs, self._staging)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._staging.close()

    def _send(self, file: OpenFile, run: Run, out: torch.Tensor) -> Sent:
        buffer = next(self._buffers())
        buffer.settle(self._staging)
        run.read(file, buffer.raw[: run.nbytes], _scratch(self._own))
        buffer.sent = self._staging.send(buffer.raw[: run.nbytes], out)
        return buffer.sent

    def _buffers(self) -> Iterator[_Buffer]:
        """This thread's, in turn."""
        if not hasattr(self._own, "buffers"):
            self._own.buffers = itertools.cycle([_Buffer(self._staging.buffer(SEGMENT)) for _ in range(BUFFERS)])
        found: Iterator[_Buffer] = self._own.buffers
        return found


class _Buffer:
    """sent: the copy that may still read it."""

    def __init__(self, raw: torch.Tensor) -> None:
        self.raw = raw
        self.sent: Sent | None = None

    def settle(self, staging: Staging) -> None:
        if self.sent is not None:
            staging.wait(self.sent)
            self.sent = None


@dataclass(frozen=True, slots=True)
class _OnItsWay:
    wanted: FileTensor
    raw: torch.Tensor
    jobs: Sequence[Future[Sent]]
    staging: Staging

    def wait(self) -> torch.Tensor:
        self.staging.receive(self.raw, [job.result() for job in self.jobs])
        return self.wanted.of_bytes(self.raw)


def _scratch(own: threading.local) -> torch.Tensor:
    if not hasattr(own, "scratch"):
        own.scratch = torch.empty(SCRATCH, dtype=torch.uint8)
    found: torch.Tensor = own.scratch
    return found

"""How calls are timed on a GPU, and what the GPU itself can do: what every benchmark named gpu_* measures with.

Calls are captured in a CUDA graph over several sets of tensors, larger than the L2 cache together, and replayed: no
host time is in a figure. Medians of replays. Without a GPU a call is timed as it is, once: the flow runs, its figures
mean nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch

SETS_BYTES = 1 << 28  # of the tensors that calls rotate through: several times an L2 cache
MOST_SETS = 32
REPLAYS = 15


@dataclass(frozen=True)
class Device:
    """Measured: bytes/s of a copy (read and written) and of reading alone, operations/s of a bfloat16 matmul."""

    copy: float
    matmul: float
    read: float = 0.0


def seconds_of(calls: Sequence[Callable[[], Any]], replays: int = REPLAYS) -> float:
    """Median time of one of the calls, which are captured in a graph together."""
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        calls[0]()
        return time.perf_counter() - begin
    for call in calls:  # compiles
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times: list[float] = []
    for _ in range(replays + 3):
        begin_at, end_at = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin_at.record()
        graph.replay()
        end_at.record()
        end_at.synchronize()
        times.append(begin_at.elapsed_time(end_at) / 1e3 / len(calls))
    return median(times[3:])


def sets_of(nbytes: int) -> int:
    """How many sets of so many bytes a measured call rotates through."""
    return max(1, min(MOST_SETS, -(-SETS_BYTES // max(1, nbytes)))) if torch.cuda.is_available() else 1


def measure_device() -> Device:
    """Without a GPU: of small arrays on the CPU."""
    there = torch.cuda.is_available()
    where, count, width = ("cuda", 1 << 29, 8192) if there else ("cpu", 1 << 18, 128)
    source = torch.randint(1 << 30, (count,), dtype=torch.int32, device=where)  # numbers as floats, too
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / seconds_of([partial(target.copy_, source)])
    # A sum reads alone; where its kernel is the slower one, the copy shows what the memory can do.
    read = max(copy, source.nbytes / seconds_of([partial(torch.sum, source.view(torch.float32))]))
    a, b = torch.randn(2, width, width, device=where).bfloat16()
    return Device(copy, 2 * width**3 / seconds_of([partial(torch.matmul, a, b)] * 4), read)

"""Where the device's time goes: torch.profiler around a call, in short."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from gpu_rows import Profile
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

MOST = 8  # kernels that are named
NAME = 80  # characters


def profiled(call: Callable[[], Any]) -> Profile:
    """Of all that the device does while `call` runs, whichever thread launched it. Without a GPU: of torch's ops on the
    CPU."""
    there = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if there else ProfilerActivity.CPU]) as found:
        call()
        if there:
            torch.cuda.synchronize()
    wanted = DeviceType.CUDA if there else DeviceType.CPU
    spans = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in found.events()
        if event.device_type == wanted and event.time_range.end > event.time_range.start
    ]
    return summary(spans)


def summary(spans: Iterable[tuple[str, float, float]]) -> Profile:
    """spans: (kernel, begin, end) in any unit of time, in any order; they may overlap."""
    ordered = sorted(spans, key=lambda span: span[1])
    if not ordered:
        return Profile((), None)
    times: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    begin, busy, until = ordered[0][1], 0.0, ordered[0][1]
    for name, start, end in ordered:
        times[name] += end - start
        calls[name] += 1
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    total = sum(times.values())
    most = sorted(times, key=lambda name: times[name], reverse=True)[:MOST]
    return Profile(tuple((name[:NAME], times[name] / total, calls[name]) for name in most), 1 - busy / (until - begin))

"""The load generator: streams completions from an OpenAI-compatible server and writes down when each token came.

Knows HTTP and arrivals. Formulas are in metrics.py. httpx with plain JSON, no client library in between. A request that
is refused, breaks off, stalls or misses its end is failed, and told with its words.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from metrics import Timing


@dataclass(frozen=True, slots=True)
class Job:
    """One request: token ids in, exactly `output_len` tokens out (if the server knows ignore_eos)."""

    prompt: tuple[int, ...]
    output_len: int


@dataclass(frozen=True, slots=True)
class Target:
    """Where to, as whom, and how long one request may take in all."""

    url: str
    model: str
    api_key: str | None = None
    timeout_s: float = 300.0

    def body(self, job: Job) -> dict[str, Any]:
        """return_token_ids (octavo, vllm) tells how many tokens a chunk holds; else a chunk counts as one."""
        return {
            "model": self.model,
            "prompt": list(job.prompt),
            "max_tokens": job.output_len,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            "return_token_ids": True,
        }


def arrival_times_s(count: int, rate_rps: float, seed: int = 0) -> list[float]:
    """When each request comes, from 0 on: a Poisson process; an infinite rate has all of them at once."""
    if rate_rps == float("inf"):
        return [0.0] * count
    draw = random.Random(seed)
    now, times = 0.0, []
    for _ in range(count):
        times.append(now)
        now += draw.expovariate(rate_rps)
    return times


async def run_load(
    target: Target,
    jobs: Sequence[Job],
    arrivals_s: Sequence[float],
    max_concurrency: int | None = None,
    on_end: Callable[[Timing], None] = lambda timing: None,
) -> tuple[list[Timing], float]:
    """Send every job at its time, at most `max_concurrency` at once; (timings in the order of jobs, duration in s).

    With a limit, a request that has to wait for others starts when it is sent.
    """
    gate = asyncio.Semaphore(max_concurrency or len(jobs) or 1)
    headers = {"Authorization": f"Bearer {target.api_key}"} if target.api_key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=max_concurrency or 256)
    async with httpx.AsyncClient(headers=headers, timeout=None, limits=limits) as client:
        begin = time.perf_counter()

        async def one(job: Job, arrival_s: float) -> Timing:
            await asyncio.sleep(begin + arrival_s - time.perf_counter())
            async with gate:
                timing = await request(client, target, job)
            on_end(timing)
            return timing

        timings = await asyncio.gather(*(one(*pair) for pair in zip(jobs, arrivals_s, strict=True)))
        return list(timings), time.perf_counter() - begin


async def request(client: httpx.AsyncClient, target: Target, job: Job) -> Timing:
    """One streamed completion. Never raises for what goes wrong with it."""
    start = time.perf_counter()
    seen = _Seen()
    error: str | None
    try:
        async with asyncio.timeout(target.timeout_s):
            async with client.stream("POST", f"{target.url}/v1/completions", json=target.body(job)) as response:
                if response.status_code == 200:
                    async for line in response.aiter_lines():
                        seen.take(line)
                    error = seen.error or (None if seen.ended else "the stream broke off")
                else:
                    error = f"HTTP {response.status_code}: {(await response.aread()).decode(errors='replace')[:200]}"
    except TimeoutError:
        error = f"no end within {target.timeout_s:.0f} s"
    except (httpx.HTTPError, ValueError, KeyError) as problem:
        error = f"{type(problem).__name__}: {problem}"
    return Timing(
        start_s=start,
        end_s=time.perf_counter(),
        num_prompt_tokens=len(job.prompt),
        num_output_tokens=len(seen.times_s) if seen.num_tokens is None else seen.num_tokens,
        token_times_s=tuple(seen.times_s),
        error=error,
    )


class _Seen:
    """What a stream has brought so far."""

    def __init__(self) -> None:
        self.times_s: list[float] = []
        self.num_tokens: int | None = None  # as the server counts them
        self.ended = False
        self.error: str | None = None

    def take(self, line: str) -> None:
        if not line.startswith("data:"):
            return
        data = line[5:].strip()
        if data == "[DONE]":
            self.ended = True
            return
        chunk = json.loads(data)
        if chunk.get("error"):
            self.error = str(chunk["error"].get("message", chunk["error"]))[:200]
            return
        now = time.perf_counter()
        for choice in chunk.get("choices", ()):
            token_ids = choice.get("token_ids")
            count = len(token_ids) if token_ids is not None else int(bool(choice.get("text")))
            self.times_s.extend([now] * count)
        usage = chunk.get("usage")
        if usage:
            self.num_tokens = usage["completion_tokens"]


def most_at_once(timings: Sequence[Timing]) -> int:
    """The most requests that were under way at one moment."""
    changes = sorted([(t.start_s, 1) for t in timings] + [(t.end_s, -1) for t in timings], key=lambda c: (c[0], c[1]))
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most

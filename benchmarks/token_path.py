"""What it costs to carry tokens from an engine to the client: replica → side channel → ingress → text → events → HTTP.

    python benchmarks/token_path.py

The engine is a fake one, so that all there is to measure is the path. One replica, one ingress, `octavo serve` as it
comes. Three looks at it:

- throughput: many streams from an engine whose steps cost nothing but the scheduler's time. Beside tokens per second
  the CPU time per token of each process is printed: on a busy machine it is the figure that stays.
- TTFT: one short request at a time, an engine with 1 ms steps; what the path adds to the same engine in this process.
- ITL: streams from an engine with slow steps, against the same engine in this process.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from metrics import percentile
from report import RESULTS, console, save, show, table
from server import Server, family
from streams import Stream, run_streams

from octavo.engine.build import build_engine
from octavo.engine.config import EngineConfig
from octavo.engine.loop import EngineLoop
from octavo.engine.params import SamplingParams
from octavo.engine.types import Request, TokenDelta

GOAL_TOKENS_S = 20_000.0
GOAL_ITL_MS = 1.5
PROMPT = "Once upon a time"
TICKS = os.sysconf("SC_CLK_TCK")
# What a process of the server is called in its command line → what it is called here.
PROCESSES = {"octavo:ingress": "ingress", "octavo:engine": "replica", "haproxy": "proxy", "ProxyActor": "proxy"}


@dataclass(frozen=True, slots=True)
class Throughput:
    streams: int
    tokens: int
    events: int
    seconds: float
    cpu_us_per_token: dict[str, float]
    ttft_p50_ms: float

    @property
    def tokens_s(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True, slots=True)
class Added:
    """A latency over HTTP and in this process, ms."""

    what: str
    streams: int
    http_p50_ms: float
    http_p99_ms: float
    engine_p50_ms: float

    @property
    def added_ms(self) -> float:
        return self.http_p50_ms - self.engine_p50_ms


def body(max_tokens: int) -> dict[str, Any]:
    return {"prompt": PROMPT, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}


def throughput(port: int, pid: int, num_streams: int, max_tokens: int) -> Throughput:
    before = cpu_seconds(pid)
    own = time.process_time()
    started = time.perf_counter()
    streams = checked(run_streams(port, [body(max_tokens)] * num_streams))
    seconds = time.perf_counter() - started
    tokens = num_streams * max_tokens
    used = {name: after - before.get(name, 0.0) for name, after in cpu_seconds(pid).items()}
    used["client"] = time.process_time() - own
    per_token = {name: value / tokens * 1e6 for name, value in used.items()}
    events = sum(len(stream.arrivals) for stream in streams)
    ttft = percentile([stream.ttft_s for stream in streams], 50) * 1e3
    return Throughput(num_streams, tokens, events, seconds, per_token, ttft)


def first_tokens(port: int, model: str, repeats: int) -> Added:
    over_http = [checked(run_streams(port, [body(2)]))[0].ttft_s for _ in range(repeats)]
    in_process = [times[0] for _ in range(repeats) for times in engine_times(model, 1, 2)]
    return _added("TTFT", 1, over_http, in_process)


def gaps(port: int, model: str, num_streams: int, max_tokens: int) -> Added:
    streams = checked(run_streams(port, [body(max_tokens)] * num_streams))
    over_http = [gap for stream in streams for gap in stream.gaps_s[1:]]
    in_process = [
        after - before
        for times in engine_times(model, num_streams, max_tokens)
        for before, after in pairwise(times[1:])
    ]
    return _added("ITL", num_streams, over_http, in_process)


def engine_times(model: str, num_streams: int, max_tokens: int) -> list[list[float]]:
    """When each token of each request comes out of the same engine in this process, seconds from its submission."""
    arrived: queue.SimpleQueue[tuple[float, list[TokenDelta]]] = queue.SimpleQueue()
    loop = EngineLoop(build_engine(config(model)).core, lambda deltas: arrived.put((time.perf_counter(), deltas)))
    loop.start()
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, seed=0)
    started = time.perf_counter()
    for number in range(num_streams):
        loop.submit(Request(str(number), tuple(PROMPT.encode()), params))
    times: list[list[float]] = [[] for _ in range(num_streams)]
    unfinished = num_streams
    while unfinished:
        at, deltas = arrived.get(timeout=60)
        for delta in deltas:
            times[int(delta.request_id)] += [at - started] * len(delta.token_ids)
            unfinished -= delta.finish_reason is not None
    loop.stop()
    return times


def config(model: str) -> EngineConfig:
    return EngineConfig(model=model, max_num_seqs=256, max_num_batched_tokens=8192)


def checked(streams: Sequence[Stream]) -> Sequence[Stream]:
    for stream in streams:
        if stream.status != 200 or not stream.arrivals:
            raise RuntimeError(f"a stream was answered with status {stream.status}")
    return streams


def cpu_seconds(pid: int) -> dict[str, float]:
    """CPU time used so far by each kind of process below `pid`, all its threads."""
    used: dict[str, float] = {}
    for member, _ in family(pid):
        try:
            command = Path(f"/proc/{member}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            stat = Path(f"/proc/{member}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        name = next((name for mark, name in PROCESSES.items() if mark in command), None)
        if name is not None:
            used[name] = used.get(name, 0.0) + (int(stat[11]) + int(stat[12])) / TICKS
    return used


def _added(what: str, num_streams: int, over_http: Sequence[float], in_process: Sequence[float]) -> Added:
    p50, p99 = (percentile(over_http, p) * 1e3 for p in (50, 99))
    return Added(what, num_streams, p50, p99, percentile(in_process, 50) * 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--max-tokens", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3, help="of which the fastest counts")
    parser.add_argument("--itl-step-ms", type=float, default=20.0)
    parser.add_argument("--haproxy", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    proxy = () if args.haproxy else ("--no-haproxy",)
    options = ("--max-num-seqs", "256", "--max-num-batched-tokens", "8192", "--log-level", "warning", *proxy)
    runs: list[Throughput] = []
    added: list[Added] = []
    for model, kind in (("fake:step_ms=0", "speed"), ("fake", "ttft"), (f"fake:step_ms={args.itl_step_ms:g}", "itl")):
        server = Server(model, options, RESULTS / "token_path.log")
        try:
            server.wait_until_ready(120)
            run_streams(server.port, [body(50)] * 8)  # everything has been used once
            if kind == "speed":
                for count in args.streams:
                    rounds = [throughput(server.port, server.pid, count, args.max_tokens) for _ in range(args.rounds)]
                    runs.append(max(rounds, key=lambda run: run.tokens_s))
            elif kind == "ttft":
                added.append(first_tokens(server.port, model, 100))
            else:
                added += [gaps(server.port, model, count, 100) for count in (1, 16)]
        finally:
            server.stop()
    report(runs, added)
    values = {"throughput": [asdict(run) for run in runs], "added": [asdict(item) for item in added]}
    save("token_path", vars(args), json.loads(json.dumps(values)), args.output)


def report(runs: Sequence[Throughput], added: Sequence[Added]) -> None:
    names = ("replica", "ingress", "proxy", "client")
    lines = table(["streams", "tokens/s", f"÷ goal ({GOAL_TOKENS_S:,.0f})", "tokens/event", "TTFT p50 ms", *names])
    for run in runs:
        cpu = [f"{run.cpu_us_per_token.get(name, 0.0):.1f}" for name in names]
        ratio = f"{run.tokens_s / GOAL_TOKENS_S:.2f}"
        each = f"{run.tokens / run.events:.2f}"
        lines.add_row(str(run.streams), f"{run.tokens_s:,.0f}", ratio, each, f"{run.ttft_p50_ms:.1f}", *cpu)
    show("Throughput (last columns: µs of CPU per token)", lines)
    lines = table(["", "streams", "HTTP p50 ms", "p99 ms", "engine p50 ms", "added ms"])
    for item in added:
        values = (item.http_p50_ms, item.http_p99_ms, item.engine_p50_ms, item.added_ms)
        lines.add_row(item.what, str(item.streams), *(f"{value:.2f}" for value in values))
    show(f"Latency (goal: at most {GOAL_ITL_MS} ms added to ITL p50)", lines)
    console.print()


if __name__ == "__main__":
    main()

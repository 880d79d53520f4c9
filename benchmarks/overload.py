"""What becomes of goodput when more is asked of a server than it can do.

    python benchmarks/overload.py

`octavo serve` with a fake engine of a known pace (so that two cores hold the server and its load): its capacity is
measured with as many requests at once as it has places, then requests come in a Poisson process at multiples of it,
whatever has become of those before. Goodput: requests per second that kept the SLO. Refused: 429 with Retry-After.
"""

from __future__ import annotations

import argparse
import selectors
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from load import arrival_times_s
from metrics import percentile
from report import RESULTS, console, save, show, table
from server import Server
from streams import Stream, request_bytes, run_streams

GOAL = 0.9  # of the goodput at capacity


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one load. Latencies of the requests that were served, s."""

    load: float
    rate_rps: float
    sent: int
    served: int
    refused: int
    failed: int
    goodput_rps: float
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_p99_s: float


def body(number: int, max_tokens: int) -> dict[str, Any]:
    prompt = f"{number:08d} " + "x" * 91
    return {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}


def open_loop(port: int, times_s: Sequence[float], max_tokens: int) -> list[Stream]:
    """A request at each of `times_s`, each on a connection of its own; returns when all have ended."""
    selector = selectors.DefaultSelector()
    streams: list[Stream] = []
    begin, open_now = time.perf_counter(), 0
    while open_now or len(streams) < len(times_s):
        now = time.perf_counter()
        while len(streams) < len(times_s) and begin + times_s[len(streams)] <= now:
            connection = socket.create_connection(("127.0.0.1", port))
            stream = Stream(time.perf_counter())
            connection.sendall(request_bytes(body(len(streams), max_tokens)))
            connection.setblocking(False)
            selector.register(connection, selectors.EVENT_READ, stream)
            streams.append(stream)
            open_now += 1
        due = begin + times_s[len(streams)] - time.perf_counter() if len(streams) < len(times_s) else 1.0
        for key, _ in selector.select(timeout=max(0.0, min(due, 1.0))):
            data = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
            if data:
                key.data.take(data, time.perf_counter())
            if not data or key.data.done or key.data.status not in (0, 200):
                selector.unregister(key.fileobj)
                key.fileobj.close()  # type: ignore[union-attr]
                open_now -= 1
    return streams


def outcome(load: float, rate: float, streams: Sequence[Stream], args: argparse.Namespace) -> Outcome:
    served = [stream for stream in streams if stream.status == 200 and stream.done and stream.arrivals]
    # Until the last of them has ended: those that wait at the end are served beyond the last arrival.
    seconds = max(stream.arrivals[-1] for stream in served) - streams[0].sent_at
    tpots = [(s.arrivals[-1] - s.arrivals[0]) / (args.max_tokens - 1) for s in served]
    kept = sum(
        stream.ttft_s <= args.slo_ttft and tpot <= args.slo_tpot for stream, tpot in zip(served, tpots, strict=True)
    )
    refused = sum(stream.status == 429 for stream in streams)
    ttfts = [stream.ttft_s for stream in served]
    failed = len(streams) - len(served) - refused
    return Outcome(
        load,
        rate,
        len(streams),
        len(served),
        refused,
        failed,
        kept / seconds,
        percentile(ttfts, 50),
        percentile(ttfts, 99),
        percentile(tpots, 99),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 1, 2, 3], help="in capacities")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each load")
    parser.add_argument("--step-ms", type=float, default=40.0)
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=25)
    parser.add_argument("--max-queue-wait", type=float, default=2.0)
    parser.add_argument("--slo-ttft", type=float, default=4.0)
    parser.add_argument("--slo-tpot", type=float, default=0.1)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    model = f"fake:step_ms={args.step_ms:g}"
    options = ("--max-num-seqs", str(args.max_num_seqs), "--max-queue-wait", str(args.max_queue_wait))
    server = Server(model, (*options, "--log-level", "warning"), RESULTS / "overload.log")
    outcomes = []
    try:
        server.wait_until_ready(120)
        run_streams(server.port, [body(0, 5)] * 4)
        begin, count = time.perf_counter(), args.max_num_seqs * 6
        run_streams(server.port, [body(number, args.max_tokens) for number in range(count)])
        capacity = count / (time.perf_counter() - begin)
        for load in args.loads:
            rate = load * capacity
            times = arrival_times_s(round(rate * args.seconds), rate)
            streams = open_loop(server.port, times, args.max_tokens)
            outcomes.append(outcome(load, rate, streams, args))
    finally:
        server.stop()
    at_capacity = next((o.goodput_rps for o in outcomes if o.load == 1), capacity)
    columns = ["load", "requests/s", "sent", "served", "refused", "failed", "goodput/s", "÷ at capacity"]
    lines = table([*columns, "TTFT p50 s", "p99 s", "TPOT p99 s"])
    for one in outcomes:
        counts = (one.sent, one.served, one.refused, one.failed)
        latencies = (one.ttft_p50_s, one.ttft_p99_s, one.tpot_p99_s)
        ratio = f"{one.goodput_rps / at_capacity:.2f}"
        values = (f"{one.rate_rps:.1f}", *map(str, counts), f"{one.goodput_rps:.1f}", ratio)
        lines.add_row(f"{one.load:g} ×", *values, *(f"{value:.2f}" for value in latencies))
    show(f"Overload (capacity {capacity:.1f} requests/s; goal: {GOAL} of the goodput at capacity)", lines)
    console.print()
    save("overload", vars(args), [asdict(one) for one in outcomes], args.output)


if __name__ == "__main__":
    main()

"""What it costs to tell every rank of a replica what to compute: python benchmarks/plan_channel.py

Microseconds per step over the channel between driver and rank processes on this machine, encoding and decoding
included: `broadcast` until the last rank has the decoded plan, `round trip` until the driver has the decoded result.
`encode`, `decode`: one plan alone, in one process. Decode steps: one token per row, a block table edit in every 16th.
Ranks compute nothing and wait in `recv` when a plan comes, as between two steps.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from multiprocessing.connection import Connection

from octavo.engine.core.plan import Row, RowResult, StepPlan, StepResult
from octavo.engine.process import wire
from octavo.engine.process.channel import ChannelClosed, Hub, dial

BLOCK = 16


def plan(step: int, rows: int) -> StepPlan:
    edits = tuple((slot, 3, slot * 7) for slot in range(step % BLOCK, rows, BLOCK))
    return StepPlan(step, (), (), edits, (), tuple(Row(slot, 500 + step, 1, 0, True) for slot in range(rows)))


def rank(number: int, address: tuple[str, int], token: str, answers: bool, arrivals: Connection) -> None:
    """A rank that computes nothing. Sends the clock of each plan's arrival when the driver hangs up."""
    line = dial(address, wire.Hello(token, number, os.getpid(), ""))
    times: list[int] = []
    results: dict[int, StepResult] = {}
    try:
        while isinstance(message := line.receive(), wire.Step):
            times.append(time.monotonic_ns())
            if answers:
                rows = len(message.plan.rows)
                template = results.setdefault(rows, StepResult(0, (RowResult((1000,)),) * rows, 0.01))
                line.send(wire.Done(template))
    except ChannelClosed:
        pass
    arrivals.send(times)


def measure(ranks: int, rows: int, steps: int, pause_s: float) -> tuple[list[float], list[float]]:
    """Microseconds of each step: (broadcast, round trip)."""
    hub = Hub("127.0.0.1", ranks, "token")
    context = multiprocessing.get_context("spawn")
    ends, processes = [], []
    for number in range(ranks):
        ours, theirs = context.Pipe()
        process = context.Process(target=rank, args=(number, hub.address, "token", number == ranks - 1, theirs))
        process.start()
        ends.append(ours)
        processes.append(process)
    here = 0
    while here < ranks:
        here += sum(isinstance(message, wire.Hello) for _, message in hub.poll(1.0))
    plans = [plan(step, rows) for step in range(steps)]
    started, round_trips = [], []
    for each in plans:
        time.sleep(pause_s)
        begin = time.monotonic_ns()
        hub.broadcast(wire.Step(each))
        while not any(isinstance(message, wire.Done) for _, message in hub.poll(1.0)):
            pass
        round_trips.append((time.monotonic_ns() - begin) / 1e3)
        started.append(begin)
    hub.broadcast(wire.Stop())
    arrivals = [end.recv() for end in ends]
    for process in processes:
        process.join()
    hub.close()
    broadcasts = [(max(times) - begin) / 1e3 for begin, *times in zip(started, *arrivals, strict=True)]
    return broadcasts, round_trips


def codec(rows: int) -> tuple[float, float, int]:
    """(microseconds to encode, to decode, bytes) of one plan, minima."""
    message = wire.Step(plan(0, rows))
    data = wire.encode(message)

    def best(call: object) -> float:
        times = []
        for _ in range(300):
            begin = time.perf_counter()
            call()  # type: ignore[operator]
            times.append(time.perf_counter() - begin)
        return min(times) * 1e6

    return best(lambda: wire.encode(message)), best(lambda: wire.to_rank.decode(data)), len(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--pause-ms", type=float, default=2.0, help="between steps")
    options = parser.parse_args()
    print(f"{os.cpu_count()} CPUs, {options.steps} steps each; microseconds")
    print(f"{'':12}{'':>6}{'plan':>8}{'':>8}{'':>8}{'broadcast':>20}{'round trip':>20}")
    print(f"{'ranks':>12}{'rows':>6}{'bytes':>8}{'encode':>8}{'decode':>8}{'p50':>10}{'p99':>10}{'p50':>10}{'p99':>10}")
    for ranks in options.ranks:
        for rows in options.rows:
            encode_us, decode_us, size = codec(rows)
            parts = measure(ranks, rows, options.steps, options.pause_ms / 1e3)
            figures = [part for us in parts for part in (statistics.median(us), statistics.quantiles(us, n=100)[98])]
            print(
                f"{ranks:12}{rows:6}{size:8}{encode_us:8.1f}{decode_us:8.1f}"
                + "".join(f"{us:10.0f}" for us in figures),
                flush=True,
            )


if __name__ == "__main__":
    main()

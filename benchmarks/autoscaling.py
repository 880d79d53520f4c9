"""What the autoscaler does with loads of hours, on a simulated pool: reaction, waiting, cost.

    python benchmarks/autoscaling.py [--target-queued-tokens 4096 --upscale-delay 10 …]

A fluid model of replicas (octavo.cluster.autoscaling_simulation): a few seconds for two days. Cost is replica seconds ÷
those of an oracle that has what the load needs at once; wait is a newcomer's, until its prompt is computed. Moves are
changes of the number of replicas. To choose settings, give it a machine like yours.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from metrics import percentile
from report import save, show, table

from octavo.cluster.autoscaling_simulation import Machine, Moment, simulate
from octavo.cluster.config import Autoscaling

HOUR = 3600.0
Load = Callable[[float], float]


def loads(capacity: float) -> dict[str, tuple[Load, float]]:
    """Name → (requests/s at a time, hours), in terms of what one replica can carry."""
    rng = random.Random(1)
    noise = [rng.uniform(0.8, 1.2) for _ in range(int(4 * HOUR) + 1)]
    shapes: dict[str, tuple[Load, float]] = {
        "constant": (lambda t: 2.5, 2),
        "constant ± 20 %": (lambda t: 2.5 * noise[int(t)], 4),
        "step up": (lambda t: 0.5 if t < 600 else 4.0, 1),
        "step down": (lambda t: 4.0 if t < 1200 else 0.5, 2),
        "ramp": (lambda t: 8.0 * t / HOUR, 1),
        "burst of 30 s": (lambda t: 10.0 if 600 <= t < 630 else 0.5, 2),
        "day and night": (lambda t: 2.5 - 2.25 * math.cos(2 * math.pi * t / 86400), 48),
        "sawtooth": (lambda t: 0.5 + 4.0 * (t % 1200) / 1200, 4),
    }
    return {name: ((lambda t, shape=shape: capacity * shape(t)), hours) for name, (shape, hours) in shapes.items()}


def summary(history: list[Moment]) -> dict[str, float]:
    waits = [moment.wait_s for moment in history]
    return {
        "moves": sum(before.target != after.target for before, after in pairwise(history)),
        "most": max(moment.target for moment in history),
        "cost": sum(m.target for m in history) / sum(max(1, math.ceil(m.needed)) for m in history),
        "wait_mean_s": fmean(waits),
        "wait_p99_s": percentile(waits, 99),
        "wait_max_s": max(waits),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target-queued-tokens", type=float, default=4096)
    parser.add_argument("--target-kv-usage", type=float, default=0.8)
    parser.add_argument("--upscale-delay", type=float, default=10)
    parser.add_argument("--downscale-delay", type=float, default=300)
    parser.add_argument("--look-back", type=float, default=10)
    parser.add_argument("--capacity", type=float, default=2, help="requests/s of one replica")
    parser.add_argument("--start", type=float, default=30, help="seconds that a replica takes to start")
    parser.add_argument("--prompt-tokens", type=float, default=500)
    parser.add_argument("--generation-tokens", type=float, default=200)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    settings = Autoscaling(
        max_replicas=20,
        target_queued_tokens=args.target_queued_tokens,
        target_kv_usage=args.target_kv_usage,
        upscale_delay_s=args.upscale_delay,
        downscale_delay_s=args.downscale_delay,
        look_back_period_s=args.look_back,
    )
    machine = Machine(
        capacity_s=args.capacity,
        start_s=args.start,
        prompt_tokens=args.prompt_tokens,
        generation_tokens=args.generation_tokens,
    )
    results = {}
    lines = table(["load", "hours", "moves", "most", "cost ÷ oracle", "wait mean s", "p99 s", "max s"])
    for name, (load, hours) in loads(args.capacity).items():
        found = results[name] = summary(simulate(settings, load, hours * HOUR, machine))
        waits = (found["wait_mean_s"], found["wait_p99_s"], found["wait_max_s"])
        counts = (f"{hours:g}", f"{found['moves']:.0f}", f"{found['most']:.0f}", f"{found['cost']:.2f}")
        lines.add_row(name, *counts, *(f"{wait:.1f}" for wait in waits))
    show("Autoscaling", lines)
    save("autoscaling", {**asdict(settings), **asdict(machine)}, results, args.output)


if __name__ == "__main__":
    main()

"""KV waste: how much of the allocated KV cache holds nothing, on a workload of sequences of 64 to 1,024 tokens.

    python benchmarks/kv_waste.py

Real scheduler and block pool; the model is a FakeRunner, so only the lengths matter and it takes seconds. After every
step: (allocated but unused slots) ÷ (allocated slots) of all running sequences. Beside it, what a contiguous
reservation of the longest length would waste for the same sequences at the same moments.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from metrics import percentile
from report import console, save, show, table

from octavo.engine.core.blocks import BlockPool
from octavo.engine.core.engine import EngineCore
from octavo.engine.core.limits import Limits
from octavo.engine.core.scheduler import Scheduler, waste
from octavo.engine.params import SamplingParams
from octavo.engine.runner.fake import FakeRunner, VirtualClock
from octavo.engine.types import Request

GOAL = 0.04


@dataclass(frozen=True, slots=True)
class Waste:
    """Parts of the allocated slots, 0 … 1. `mean`: all unused over all allocated slots, summed over the steps."""

    mean: float
    p50: float
    p99: float
    contiguous_mean: float
    steps: int
    sequences: int
    preemptions: int


def workload(count: int, shortest: int, longest: int, seed: int) -> list[tuple[int, int]]:
    """(prompt tokens, tokens to generate) of each sequence: a sum uniform in [shortest, longest], split anywhere."""
    draw = random.Random(seed)
    pairs = []
    for _ in range(count):
        total = draw.randint(shortest, longest)
        prompt = draw.randint(1, total - 1)
        pairs.append((prompt, total - prompt))
    return pairs


def run(
    pairs: Sequence[tuple[int, int]],
    block_size: int,
    longest: int,
    num_blocks: int,
    max_num_seqs: int,
    progress: Callable[[int], None] = lambda finished: None,
) -> Waste:
    """Run the workload to its end; all sequences are there from the start."""
    limits = Limits(
        block_size=block_size,
        max_model_len=longest + 1,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=2048,
        vocab_size=256,
    )
    scheduler = Scheduler(limits, BlockPool(num_blocks))
    clock = VirtualClock()
    core = EngineCore(scheduler, FakeRunner(num_blocks, block_size, sleep=clock.sleep), clock)
    draw = random.Random(0)
    for number, (prompt, output) in enumerate(pairs):
        tokens = tuple(draw.randrange(256) for _ in range(prompt))
        params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True, seed=number)
        core.add(Request(str(number), tokens, params))
    samples: list[float] = []
    unused_slots = allocated_slots = contiguous_slots = finished = 0
    while core.has_work:
        finished += sum(delta.finish_reason is not None for delta in core.step())
        unused, allocated = waste(scheduler.running, block_size)
        if allocated:
            samples.append(unused / allocated)
            unused_slots += unused
            allocated_slots += allocated
            contiguous_slots += longest * len(scheduler.running)
        progress(finished)
    used_slots = allocated_slots - unused_slots
    return Waste(
        mean=unused_slots / allocated_slots,
        p50=percentile(samples, 50),
        p99=percentile(samples, 99),
        contiguous_mean=1 - used_slots / contiguous_slots,
        steps=len(samples),
        sequences=len(pairs),
        preemptions=scheduler.stats().preemptions,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="KV waste of the paged cache, beside a contiguous reservation.")
    parser.add_argument("--sequences", type=int, default=300)
    parser.add_argument("--min-len", type=int, default=64, help="shortest sequence, prompt and output together")
    parser.add_argument("--max-len", type=int, default=1024)
    parser.add_argument("--block-size", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--kv-tokens", type=int, default=65536, help="slots of the KV pool")
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="result file (default: build/benchmarks/)")
    args = parser.parse_args()
    if not 2 <= args.min_len <= args.max_len:
        parser.error("--min-len must be at least 2 and at most --max-len.")
    if args.kv_tokens < args.max_len + max(args.block_size):
        parser.error("--kv-tokens must hold at least one sequence of --max-len.")
    pairs = workload(args.sequences, args.min_len, args.max_len, args.seed)
    found = table(("block size", "mean waste", "p50", "p99", "contiguous", "steps", "preemptions"), left=0)
    results = {}
    for size in args.block_size:
        with console.status(f"block size {size}") as status:

            def progress(finished: int, status=status, size=size) -> None:
                status.update(f"block size {size}: {finished} of {len(pairs)} sequences")

            result = run(pairs, size, args.max_len, args.kv_tokens // size, args.max_num_seqs, progress)
        results[size] = asdict(result)
        found.add_row(
            str(size),
            f"{result.mean:.2%}",
            f"{result.p50:.2%}",
            f"{result.p99:.2%}",
            f"{result.contiguous_mean:.1%}",
            str(result.steps),
            str(result.preemptions),
        )
    show(f"KV waste: {len(pairs)} sequences of {args.min_len} to {args.max_len} tokens (goal: below {GOAL:.0%})", found)
    save("kv_waste", vars(args), results, args.output)


if __name__ == "__main__":
    main()

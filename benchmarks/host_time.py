"""The host's time per decode step beside the model's, at several lengths of context.

    python benchmarks/host_time.py

--n sequences share a prefix, so that a long context costs one prefill and little KV, and generate --output-len tokens
each. Planning ahead is off: what the host does is then not hidden behind the model, and not slowed down by it. Medians
over all decode steps of all rounds.

Columns: plan, commit = the scheduler; text = launch, deltas and detokenization; rank = building inputs, sampling and
reading back; host = their sum. Goals: host at most 5 % of the step, and the same whatever the context.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from drive import Bench, Step
from options import engine_options
from prompts import random_prompts
from report import console, save, show, table

from octavo.engine.config import EngineConfig
from octavo.engine.errors import ConfigError, RequestError

SUFFIX = 16  # tokens in which the sequences differ
GOAL_PART = 0.05
GOAL_GROWTH = 1.2  # longest context ÷ shortest: above the noise, below what any work per token of context would make


@dataclass(frozen=True, slots=True)
class HostTime:
    """Of one context, medians in seconds."""

    context: int
    steps: int
    step_s: float
    plan_s: float
    commit_s: float
    text_s: float
    rank_s: float
    host_s: float

    @property
    def part(self) -> float:
        return self.host_s / self.step_s


def host_time_of(context: int, steps: Sequence[Step]) -> HostTime:
    """Of decode steps of the same number of rows. The sum's median is its own: no sum of medians."""
    return HostTime(
        context=context,
        steps=len(steps),
        step_s=median(step.wall_s for step in steps),
        plan_s=median(step.plan_s for step in steps),
        commit_s=median(step.commit_s for step in steps),
        text_s=median(step.text_s for step in steps),
        rank_s=median(step.rank_bookkeeping_s for step in steps),
        host_s=median(step.host_s + step.rank_bookkeeping_s for step in steps),
    )


def measure(bench: Bench, n: int, context: int, output_len: int, rounds: int) -> HostTime:
    vocab = bench.engine.info.vocab_size
    [prefix] = random_prompts(1, context - SUFFIX, vocab, ("context", context))
    bench.run([prefix], 1)
    steps: list[Step] = []
    for round_ in range(rounds + 1):  # the first one warms up
        prompts = [[*prefix, *rest] for rest in random_prompts(n, SUFFIX, vocab, (context, round_))]
        with console.status(f"context {context}, round {round_} of {rounds}"):
            run = bench.run(prompts, output_len)
        if round_:
            steps += [step for step in run.steps if step.decode and step.rows == n]
    return host_time_of(context, steps)


def growth(found: Sequence[HostTime]) -> float:
    """Host time at the longest context ÷ at the shortest."""
    ordered = sorted(found, key=lambda one: one.context)
    return ordered[-1].host_s / ordered[0].host_s


def show_results(found: Sequence[HostTime], args: argparse.Namespace) -> None:
    shown = table(("context", "step", "plan", "commit", "text", "rank", "host", "of the step", "goal", ""), left=0)
    for one in found:
        parts = (one.step_s, one.plan_s, one.commit_s, one.text_s, one.rank_s, one.host_s)
        shown.add_row(
            f"{one.context:,}",
            *(f"{1000 * seconds:.3f} ms" for seconds in parts),
            f"{one.part:.1%}",
            f"{GOAL_PART:.0%}",
            _verdict(one.part <= GOAL_PART),
        )
    show(f"{args.model}: host time per decode step of n={args.n}, medians of {found[0].steps} steps", shown)
    if len(found) > 1:
        grown = growth(found)
        console.print(
            f"host time at the longest context ÷ at the shortest: {grown:.2f} "
            f"(goal: at most {GOAL_GROWTH}) {_verdict(grown <= GOAL_GROWTH)}"
        )


def _verdict(met: bool) -> str:
    return "[green]met[/green]" if met else "[red]missed[/red]"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The host's time per decode step, at several lengths of context.")
    parser.add_argument("--model", default="smollm2-135m", help="preset, folder, .gguf, hub id, or fake")
    parser.add_argument("--n", type=int, default=32, help="sequences at once")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024, 4096], help="prompt tokens of each")
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--options", nargs="*", default=[], metavar="FIELD=VALUE", help="further EngineConfig fields")
    parser.add_argument("--output", type=Path, help="result file (default: build/benchmarks/)")
    args = parser.parse_args(arguments)
    if min(args.contexts) <= SUFFIX:
        parser.error(f"--contexts must be above {SUFFIX}")
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    settings = {
        "model": args.model,
        "dtype": args.dtype,
        "async_scheduling": False,
        "max_num_seqs": max(8, args.n),
        "kv_cache_memory_bytes": 2**30,
        **engine_options(args.options),
    }
    try:
        bench = Bench(EngineConfig(**settings))
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from error
    try:
        found = [measure(bench, args.n, context, args.output_len, args.rounds) for context in args.contexts]
    except RequestError as error:
        raise SystemExit(f"error: {error}") from error
    finally:
        bench.close()
    show_results(found, args)
    content = {"growth": growth(found), "contexts": [{**asdict(one), "part": one.part} for one in found]}
    save("host_time", vars(args), content, args.output)


if __name__ == "__main__":
    main()

"""Offline throughput and latency of octavo, with the host's time per step, beside the machine's floor.

    python benchmarks/offline.py --n 1 8 32

All prompts start together, each of exactly --input-len random token ids, and generate exactly --output-len tokens, text
included. Medians over the rounds; steps are those of all rounds.

Columns: generated = all generated tokens ÷ the whole time; prefill = prompt tokens ÷ time of the steps that computed
any; decode step = median turn of the loop in which every row got one token; host = scheduler, commit and
detokenization per such turn, as part of it (hidden behind the model while it is shorter); rank = building inputs,
sampling and reading back, as part of it; floor = what the machine allows for the whole run.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from checkpoint import model_shape
from drive import Bench, Run, Step
from floor import Machine, ModelShape, best_of, decode_s, describe, measure_machine, prefill_s, run_s
from metrics import percentile, throughput, tpot_s, ttft_s
from options import engine_options
from prompts import random_prompts
from report import console, save, show, table

from octavo.engine.config import EngineConfig
from octavo.engine.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Result:
    """Of one n. Parts are of the decode step, 0 … 1; nan where there was no such step."""

    n: int
    output_throughput_tps: float
    prefill_throughput_tps: float
    decode_step_s: float
    host_s: float
    host_part: float
    rank_bookkeeping_s: float
    rank_bookkeeping_part: float
    p50_ttft_s: float
    p50_tpot_s: float
    round_output_throughputs_tps: tuple[float, ...]


def result_of(n: int, input_len: int, output_len: int, runs: Sequence[Run]) -> Result:
    steps = [step for run in runs for step in run.steps]
    decodes = [step for step in steps if step.decode and step.rows == n]
    speeds = tuple(throughput(n * output_len, run.wall_s) for run in runs)
    timings = [timing for run in runs for timing in run.timings]
    step_s = _median(decodes, "wall_s")
    return Result(
        n=n,
        output_throughput_tps=median(speeds),
        prefill_throughput_tps=median(throughput(n * input_len, _prefill_s(run.steps)) for run in runs),
        decode_step_s=step_s,
        host_s=_median(decodes, "host_s"),
        host_part=_median(decodes, "host_s") / step_s,
        rank_bookkeeping_s=_median(decodes, "rank_bookkeeping_s"),
        rank_bookkeeping_part=_median(decodes, "rank_bookkeeping_s") / step_s,
        p50_ttft_s=percentile([value for value in map(ttft_s, timings) if value is not None], 50),
        p50_tpot_s=percentile([value for value in map(tpot_s, timings) if value is not None], 50),
        round_output_throughputs_tps=speeds,
    )


def _prefill_s(steps: Sequence[Step]) -> float:
    return sum(step.computed_s for step in steps if not step.decode)


def _median(steps: Sequence[Step], name: str) -> float:
    return median(getattr(step, name) for step in steps) if steps else math.nan


def measure(bench: Bench, n: int, input_len: int, output_len: int, rounds: int) -> Result:
    vocab = bench.engine.info.vocab_size
    bench.run(random_prompts(n, input_len, vocab, "warm-up"), min(4, output_len))
    runs = []
    for round_ in range(rounds):
        with console.status(f"n={n}, round {round_ + 1} of {rounds}"):
            runs.append(bench.run(random_prompts(n, input_len, vocab, (round_, n)), output_len))
    return result_of(n, input_len, output_len, runs)


def show_results(
    results: Sequence[Result], machine: Machine, shape: ModelShape | None, args: argparse.Namespace
) -> None:
    columns = ["n", "generated/s", "prefill/s", "decode step", "host", "rank", "TTFT p50", "TPOT p50"]
    if shape is not None:
        columns += ["floor: generated/s", "prefill/s", "decode step", "of floor"]
    found = table(columns, left=0)
    for r in results:
        row = [
            str(r.n),
            f"{r.output_throughput_tps:,.1f}",
            f"{r.prefill_throughput_tps:,.0f}",
            f"{1000 * r.decode_step_s:.2f} ms",
            f"{1000 * r.host_s:.2f} ms, {r.host_part:.1%}",
            f"{1000 * r.rank_bookkeeping_s:.2f} ms, {r.rank_bookkeeping_part:.1%}",
            f"{1000 * r.p50_ttft_s:.0f} ms",
            f"{1000 * r.p50_tpot_s:.1f} ms",
        ]
        if shape is not None:
            best = throughput(r.n * args.output_len, run_s(machine, shape, r.n, args.input_len, args.output_len))
            prefill = throughput(r.n * args.input_len, prefill_s(machine, shape, r.n, args.input_len))
            step_s = decode_s(machine, shape, r.n, args.input_len + args.output_len / 2)
            row += [f"{best:,.1f}", f"{prefill:,.0f}", f"{1000 * step_s:.2f} ms"]
            row += [f"{r.output_throughput_tps / best:.0%}"]
        found.add_row(*row)
    title = (
        f"{args.model}: {args.input_len} tokens in, {args.output_len} out, median of {args.rounds} rounds (tokens/s)"
    )
    show(title, found)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Offline throughput and latency of octavo, beside the machine's floor."
    )
    parser.add_argument("--model", default="smollm2-135m", help="preset, folder, .gguf, hub id, or fake")
    parser.add_argument("--n", type=int, nargs="+", default=[1, 8, 32], help="prompts at once")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, help="torch threads (default: all cores)")
    parser.add_argument(
        "--options", nargs="*", default=[], metavar="FIELD=VALUE", help="further fields of EngineConfig"
    )
    parser.add_argument("--output", type=Path, help="result file (default: build/benchmarks/)")
    return parser.parse_args()


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """Prefix caching is off, unless asked for, so that no prompt can profit from another."""
    settings: dict[str, Any] = {
        "model": args.model,
        "dtype": args.dtype,
        "enable_prefix_caching": False,
        "max_num_seqs": max(8, *args.n),
        **engine_options(args.options),
    }
    return EngineConfig(**settings)


def main() -> None:
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        bench = Bench(engine_config(args))
        dtype: torch.dtype = getattr(torch, bench.engine.info.dtype, torch.float32)  # the fake engine's is "none"
        shape = None
        if args.model != "fake":
            shape = model_shape(args.model, dtype)
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from error
    before = measure_machine(dtype=dtype)
    try:
        results = [measure(bench, n, args.input_len, args.output_len, args.rounds) for n in args.n]
    finally:
        bench.close()
    machine = best_of(before, measure_machine(dtype=dtype))
    console.print(f"this machine: {describe(machine)}")
    show_results(results, machine, shape, args)
    info = {"dtype": bench.engine.info.dtype, "num_blocks": bench.engine.info.num_blocks}
    content = {"machine": asdict(machine), "engine": info, "runs": [asdict(result) for result in results]}
    if shape is not None:
        content["floor_output_throughput"] = {
            n: throughput(n * args.output_len, run_s(machine, shape, n, args.input_len, args.output_len))
            for n in args.n
        }
    save("offline", vars(args), content, args.output)


if __name__ == "__main__":
    main()

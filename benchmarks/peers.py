"""octavo, transformers, vllm and llama.cpp on one machine, one model, the same prompts, in one run.

    python benchmarks/peers.py --install

Each engine is a process in its own venv, loaded once and frozen while another works. In every round each engine gets
the same new random prompts (nothing can be cached), in turn; the first engine changes from round to round. Greedy, end
tokens ignored. Reported: medians of generated tokens/s (prompts included in the time), as ratios beside their goals and
the machine's floor measured in the same run, and how far the engines' tokens agree.

Float engines and octavo's int8, which it quantizes on load, read one Hugging Face folder with bfloat16 weights, as the
hubs hold them, and compute in float32. octavo-gguf and llama.cpp run one GGUF file as it is.

Prefill and decode apart (--split-n): in each round the same prompts also run with a single output token, the prefill;
what the whole takes longer is the decode. The same for every engine.

vllm runs as it comes, and at its best on CPU: threads bound to all cores and Intel's OpenMP library preloaded, compiled
and eager, since which of the two is faster depends on n and on the machine. A goal's ratio is to the fastest of them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from checkpoint import gguf_file, model_folder, model_shape, stored_bytes_per_parameter, vocab_size
from comparison import AGREE_ON, GOALS, Measured, Verdict, Work, agreement, ratios, speed, verdicts
from floor import Machine, ModelShape, best_of, decode_s, describe, measure_machine, prefill_s, run_s
from metrics import throughput
from options import engine_options
from prompts import random_prompts
from report import RESULTS, console, save, table
from report import show as show_table
from variants import VARIANTS, Variant, pythons, start
from worker import Worker, WorkerError

from octavo.engine.env import cache_dir
from octavo.engine.errors import ConfigError

SPLIT_REPEATS = 3  # a prefill is short: the median of so many in each round
Floors = dict[str, dict[str, float]]  # of weights kept in a way → column → tokens/s


def measure(
    variants: Sequence[Variant], found: dict[str, Path], models: dict[str, Path], args: argparse.Namespace
) -> dict[str, Measured]:
    """Load all engines one after the other, then run the rounds. An engine that fails is left out from there on."""
    workers: dict[str, Worker] = {}
    results: dict[str, Measured] = {}
    vocab = vocab_size(models["float32"])
    with contextlib.ExitStack() as stack:
        for variant in variants:
            begin = start(variant, found[variant.engine], args.threads, engine_options(args.octavo_options))
            worker = Worker(variant.name, begin.command, begin.environment, RESULTS / "logs" / f"{variant.name}.log")
            stack.callback(worker.close)
            try:
                with console.status(f"loading {variant.name}"):
                    job = {"op": "load", "model": str(models[variant.weights]), "max_rows": max(args.n)}
                    answer = worker.ask(job, args.load_timeout)
                    warm_up = random_prompts(max(args.n), args.input_len, vocab, "warm-up")
                    worker.ask({"op": "generate", "prompts": warm_up, "output_len": 4}, args.load_timeout)
            except WorkerError as error:
                console.print(f"[red]{variant.name} is left out: {error}[/red]")
                worker.close()
                continue
            workers[variant.name] = worker
            results[variant.name] = Measured(answer["versions"], answer["notes"], answer["seconds"])
            about = ", ".join(f"{package} {version}" for package, version in answer["versions"].items())
            console.print(f"{variant.name}: {about}, {answer['notes']}, loaded in {answer['seconds']:.1f} s")
        for round_ in range(args.rounds):
            for n in args.n:
                prompts = random_prompts(n, args.input_len, vocab, (round_, n))
                for name in rotated(list(workers), round_):
                    with console.status(f"round {round_ + 1} of {args.rounds}, n={n}: {name}"):
                        try:
                            run_round(workers[name], results[name], n, prompts, args)
                        except WorkerError as error:
                            console.print(f"[red]{name} is left out from here: {error}[/red]")
                            del workers[name]
    return results


def run_round(worker: Worker, result: Measured, n: int, prompts: list[list[int]], args: argparse.Namespace) -> None:
    answer = _generate(worker, prompts, args.output_len, args.timeout)
    result.seconds.setdefault(n, []).append(answer["seconds"])
    result.token_ids.setdefault(n, []).extend(answer["token_ids"])
    if n in args.split_n:
        prefills = [_generate(worker, prompts, 1, args.timeout)["seconds"] for _ in range(SPLIT_REPEATS)]
        result.first_token_s.setdefault(n, []).append(median(prefills))


def _generate(worker: Worker, prompts: list[list[int]], output_len: int, timeout_s: float) -> dict[str, Any]:
    answer = worker.ask({"op": "generate", "prompts": prompts, "output_len": output_len}, timeout_s)
    if [len(ids) for ids in answer["token_ids"]] != [output_len] * len(prompts):
        raise WorkerError(f"{worker.name} did not generate {output_len} tokens for each of {len(prompts)} prompts.")
    return answer


def rotated(names: list[str], by: int) -> list[str]:
    by %= max(1, len(names))
    return names[by:] + names[:by]


def shapes_of(models: dict[str, Path]) -> dict[str, ModelShape]:
    """What a step must read, with weights kept in each way; scales of int8 weights are not counted. KV is float32."""
    shape = model_shape(str(models["float32"]))
    bytes_of = {weights: stored_bytes_per_parameter(str(path)) for weights, path in models.items()} | {"int8": 1.0}
    return {weights: replace(shape, bytes_per_parameter=size) for weights, size in bytes_of.items()}


def floors(machines: dict[str, Machine], shapes: dict[str, ModelShape], work: Work, args: argparse.Namespace) -> Floors:
    """Tokens/s that the machine allows, in the columns of the table of speeds."""
    found: Floors = {}
    for weights, shape in shapes.items():
        machine = machines[weights]
        whole = {n: run_s(machine, shape, n, work.input_len, work.output_len) for n in args.n}
        columns = {f"n={n}": throughput(work.tokens(n, "whole"), seconds) for n, seconds in whole.items()}
        for n in args.split_n:
            prefill = prefill_s(machine, shape, n, work.input_len)
            step = decode_s(machine, shape, n, work.input_len + work.output_len / 2)
            columns |= {f"prefill n={n}": throughput(work.tokens(n, "prefill"), prefill), f"decode n={n}": n / step}
        found[weights] = columns
    return found


def speeds(result: Measured, work: Work, args: argparse.Namespace) -> dict[str, float | None]:
    """Tokens/s by column."""
    columns = {f"n={n}": speed(result, n, work) for n in args.n}
    for n in args.split_n:
        columns[f"prefill n={n}"] = speed(result, n, work, "prefill")
        columns[f"decode n={n}"] = speed(result, n, work, "decode")
    return columns


def show_speeds(results: dict[str, Measured], floor: Floors, work: Work, args: argparse.Namespace) -> None:
    columns = list(next(iter(floor.values())))
    found = table(("engine", "weights", *columns))
    for name, result in results.items():
        values = speeds(result, work, args)
        found.add_row(name, VARIANTS[name].weights, *(_number(values[column], ",.1f") for column in columns))
    for weights in dict.fromkeys(VARIANTS[name].weights for name in results):
        found.add_row("floor", weights, *(f"{floor[weights][column]:,.1f}" for column in columns), style="dim")
    for name, result in results.items():
        if VARIANTS[name].engine == "octavo":
            mine, best = speeds(result, work, args), floor[VARIANTS[name].weights]
            parts = (_number(mine[column] and mine[column] / best[column], ".0%") for column in columns)
            found.add_row(f"{name} ÷ floor", VARIANTS[name].weights, *parts, style="dim")
    what = f"{work.input_len} tokens in, {work.output_len} out, median of {args.rounds} rounds"
    show_table(f"{args.model}: generated tokens/s (prefill: prompt tokens/s); {what}", found)


def show_goals(found: Sequence[Verdict]) -> None:
    shown = table(("speed of", "÷ that of", "work", "ours/s", "peer's/s", "ratio", "min", "max", "goal", ""), left=3)
    for verdict in found:
        goal = verdict.goal
        shown.add_row(
            goal.ours,
            verdict.peer,
            f"n={goal.n}" if goal.part == "whole" else f"n={goal.n}, {goal.part}",
            f"{verdict.ours_tps:,.1f}",
            f"{verdict.peer_tps:,.1f}",
            f"{verdict.ratio:.2f}",
            f"{min(verdict.ratios):.2f}",
            f"{max(verdict.ratios):.2f}",
            f"{goal.at_least:.1f}",
            "[green]met[/green]" if verdict.met else "[red]missed[/red]",
        )
    show_table("goals: median, least and greatest of the rounds' own ratios", shown)


def show_ratios(results: dict[str, Measured], args: argparse.Namespace) -> None:
    """octavo beside every engine that keeps its weights in the same way."""
    shown = table(("octavo ÷", "weights", *(f"n={n}" for n in args.n)), left=2)
    for ours, peer in pairs(results):
        found = [ratios(results[ours], results[peer], n) for n in args.n]
        shown.add_row(peer, VARIANTS[peer].weights, *(_number(median(r) if r else None, ".2f") for r in found))
    show_table("ratios of speed (median of the rounds' own ratios)", shown)


def pairs(results: dict[str, Measured]) -> list[tuple[str, str]]:
    """(octavo's variant, peer) with weights kept in the same way."""
    ours = [name for name in results if VARIANTS[name].engine == "octavo"]
    peers = [name for name in results if VARIANTS[name].engine != "octavo"]
    return [(a, b) for a in ours for b in peers if VARIANTS[a].weights == VARIANTS[b].weights]


def show_agreement(results: dict[str, Measured], args: argparse.Namespace) -> None:
    for ours, peer in pairs(results):
        for n in args.n:
            same, length = agreement(results[ours].token_ids.get(n, ()), results[peer].token_ids.get(n, ()))
            console.print(
                f"{ours} and {peer}, n={n}: first {AGREE_ON} tokens equal in {same:.0%} of the prompts, "
                f"{length:.1f} of {args.output_len} tokens on average before they part"
            )


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def as_json(results: dict[str, Measured], work: Work, args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, result in results.items():
        found[name] = {
            "versions": result.versions,
            "notes": result.notes,
            "load_s": result.load_s,
            "weights": VARIANTS[name].weights,
            "tokens_per_s": speeds(result, work, args),
            "seconds": result.seconds,
            "first_token_s": result.first_token_s,
        }
    for ours, peer in pairs(results):
        beside = found[peer].setdefault("octavo_ratio", {})
        agree = found[peer].setdefault("agreement", {})
        for n in args.n:
            beside[n] = ratios(results[ours], results[peer], n)
            same, length = agreement(results[ours].token_ids.get(n, ()), results[peer].token_ids.get(n, ()))
            agree[n] = {"prompts_agreeing": same, "mean_common_tokens": length}
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="octavo beside transformers, vllm and llama.cpp: same model, prompts.")
    parser.add_argument("--model", default="smollm2-135m", help="preset, folder, .gguf or hub id")
    parser.add_argument("--gguf", type=Path, help="file of octavo-gguf and llama (default: the model's own, if any)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of a GGUF's conversion")
    parser.add_argument("--n", type=int, nargs="+", default=[1, 8, 32], help="prompts at once")
    parser.add_argument("--split-n", type=int, nargs="*", default=[1], help="of these n also prefill and decode apart")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engines", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--venvs", type=Path, default=cache_dir() / "venvs", help="folder of the peers' venvs")
    parser.add_argument("--install", action="store_true", help="make the venvs that are missing (downloads ~1 GB)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each engine")
    parser.add_argument("--octavo-options", nargs="*", default=[], metavar="FIELD=VALUE", help="EngineConfig fields")
    parser.add_argument("--load-timeout", type=float, default=900, help="seconds an engine may take to load")
    parser.add_argument("--timeout", type=float, default=600, help="seconds one round of one engine may take")
    parser.add_argument("--output", type=Path, help="result file (default: build/benchmarks/)")
    args = parser.parse_args()
    args.split_n = [n for n in args.split_n if n in args.n]
    if args.output_len < 2:
        parser.error("--output-len must be at least 2")
    return args


def models_of(args: argparse.Namespace) -> dict[str, Path]:
    """The files of each way to keep weights. Raises ConfigError."""
    folder = model_folder(args.model, args.dtype)
    gguf = args.gguf or gguf_file(args.model)
    return {"float32": folder, "int8": folder, **({} if gguf is None else {"gguf": gguf})}


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    try:
        models = models_of(args)
        shapes = shapes_of(models)
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from error
    variants = [VARIANTS[name] for name in args.engines if VARIANTS[name].weights in models]
    if left_out := set(args.engines) - {variant.name for variant in variants}:
        console.print(f"[yellow]left out: {', '.join(sorted(left_out))}: no GGUF of {args.model} (--gguf).[/yellow]")
    found = pythons([variant.engine for variant in variants], args.venvs, args.install)
    before = measure_machines()
    results = measure([variant for variant in variants if variant.engine in found], found, models, args)
    machines = {weights: best_of(machine, before[weights]) for weights, machine in measure_machines().items()}
    if not results:
        raise SystemExit("error: no engine could be measured.")
    work = Work(args.input_len, args.output_len)
    floor = floors(machines, shapes, work, args)
    for machine in (machines["float32"], machines["int8"]):
        console.print(f"this machine: {describe(machine)}")
    show_speeds(results, floor, work, args)
    show_ratios(results, args)
    judged = verdicts(results, work, [goal for goal in GOALS if goal.n in args.n])
    show_goals(judged)
    show_agreement(results, args)
    content = {
        "machines": {weights: asdict(machine) for weights, machine in machines.items()},
        "floor_tokens_per_s": floor,
        "engines": as_json(results, work, args),
        "goals": [{**asdict(verdict), "ratio": verdict.ratio, "met": verdict.met} for verdict in judged],
    }
    save("peers", vars(args), content, args.output)


def measure_machines() -> dict[str, Machine]:
    """For each way to keep weights: the peak of float32 matmuls, or of int8 ones for all quantized weights."""
    whole, small = measure_machine(), measure_machine(dtype=torch.int8)
    return {"float32": whole, "int8": small, "gguf": small}


if __name__ == "__main__":
    main()

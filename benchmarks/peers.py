"""octavo, transformers and vllm on one machine, one model, the same prompts, in one run.

    python benchmarks/peers.py --install

Each engine is a process in its own venv, loaded once and frozen while another works. In every round each engine gets
the same new random prompts (nothing can be cached), in turn; the first engine changes from round to round. Greedy, end
tokens ignored. Reported: medians of generated tokens/s (prompts included in the time), as ratios, beside the machine's
floor measured in the same run, and how far the engines' tokens agree.

vllm runs as it comes, and at its best on CPU: threads bound to all cores and Intel's OpenMP library preloaded, compiled
and eager, since which of the two is faster depends on n and on the machine. The last ratio is to the fastest of all.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from checkpoint import model_folder, model_shape, vocab_size
from floor import Machine, ModelShape, best_of, describe, measure_machine, run_s
from metrics import throughput
from options import engine_options
from prompts import random_prompts
from report import RESULTS, console, save, table
from report import show as show_table
from venvs import find_python, is_unfinished, libiomp5, make_venv
from worker import Worker, WorkerError

from octavo.engine.env import cache_dir
from octavo.engine.errors import ConfigError

WORKERS = Path(__file__).parent / "workers"
ENGINES = ("octavo", "transformers", "vllm", "vllm-best", "vllm-best-eager")
AGREE_ON = 16  # tokens; later ones may differ where two logits are nearly equal
QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True, slots=True)
class Engine:
    """How a peer is started."""

    name: str
    command: tuple[str | Path, ...]
    environment: dict[str, str]


@dataclass(slots=True)
class Measured:
    """What an engine did: per n, seconds of each round and the tokens of each round's prompts."""

    versions: dict[str, str]
    notes: str
    load_s: float
    seconds: dict[int, list[float]] = field(default_factory=dict)
    token_ids: dict[int, list[list[int]]] = field(default_factory=dict)


def engine(name: str, python: Path, threads: int, options: Sequence[str]) -> Engine:
    environment = dict(QUIET)
    if name in ("octavo", "transformers"):
        environment["OMP_NUM_THREADS"] = str(threads)
        return Engine(name, (python, WORKERS / f"worker_{name}.py", *options), environment)
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    if name.startswith("vllm-best"):
        cores = sorted(os.sched_getaffinity(0))[:threads]
        environment["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
        library = libiomp5(python)
        if library is not None:
            environment["LD_PRELOAD"] = str(library)
    return Engine(
        name, (python, WORKERS / "worker_vllm.py", *(("--eager",) if name.endswith("-eager") else ())), environment
    )


def pythons(names: Sequence[str], venvs: Path, install: bool) -> dict[str, Path]:
    """The interpreter of each engine; an engine without one is left out, with a word about it."""
    found: dict[str, Path] = {}
    for name in names:
        venv = name.partition("-")[0]
        if name == "octavo":
            found[name] = Path(sys.executable)
            continue
        python = None if is_unfinished(venvs, venv) else find_python(venvs, venv)
        if python is None and install:
            python = make_venv(venvs, venv)
        if python is None and name == "transformers":
            console.print("transformers runs in octavo's own venv (--install makes it one of its own).")
            python = Path(sys.executable)
        if python is None:
            console.print(f"[yellow]{name} is left out: no venv {venvs / venv} (--install makes it).[/yellow]")
            continue
        found[name] = python
    return found


def measure(engines: Sequence[Engine], folder: Path, args: argparse.Namespace) -> dict[str, Measured]:
    """Load all engines one after the other, then run the rounds. An engine that fails is left out from there on."""
    workers: dict[str, Worker] = {}
    results: dict[str, Measured] = {}
    vocab = vocab_size(folder)
    with contextlib.ExitStack() as stack:
        for wanted in engines:
            worker = Worker(wanted.name, wanted.command, wanted.environment, RESULTS / "logs" / f"{wanted.name}.log")
            stack.callback(worker.close)
            try:
                with console.status(f"loading {wanted.name}"):
                    job = {"op": "load", "model": str(folder), "max_rows": max(args.n)}
                    answer = worker.ask(job, args.load_timeout)
                    warm_up = random_prompts(max(args.n), args.input_len, vocab, "warm-up")
                    worker.ask({"op": "generate", "prompts": warm_up, "output_len": 4}, args.load_timeout)
            except WorkerError as error:
                console.print(f"[red]{wanted.name} is left out: {error}[/red]")
                continue
            workers[wanted.name] = worker
            results[wanted.name] = Measured(answer["versions"], answer["notes"], answer["seconds"])
            about = ", ".join(f"{package} {version}" for package, version in answer["versions"].items())
            console.print(f"{wanted.name}: {about}, {answer['notes']}, loaded in {answer['seconds']:.1f} s")
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
    job = {"op": "generate", "prompts": prompts, "output_len": args.output_len}
    answer = worker.ask(job, args.timeout)
    if [len(ids) for ids in answer["token_ids"]] != [args.output_len] * n:
        raise WorkerError(f"{worker.name} did not generate {args.output_len} tokens for each of {n} prompts.")
    result.seconds.setdefault(n, []).append(answer["seconds"])
    result.token_ids.setdefault(n, []).extend(answer["token_ids"])


def rotated(names: list[str], by: int) -> list[str]:
    by %= max(1, len(names))
    return names[by:] + names[:by]


def agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> tuple[float, float]:
    """(part of the prompts whose first AGREE_ON tokens are equal, mean length of the common beginning in tokens)."""
    common = [
        sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
        for a, b in zip(ours, theirs, strict=False)
    ]
    if not common:
        return 0.0, 0.0
    needed = min(AGREE_ON, min(len(ids) for ids in ours))
    return sum(length >= needed for length in common) / len(common), sum(common) / len(common)


def speeds(result: Measured, n: int, output_len: int) -> float | None:
    """Generated tokens/s, median over the rounds."""
    seconds = result.seconds.get(n)
    return throughput(n * output_len, median(seconds)) if seconds else None


def floors(machine: Machine, shape: ModelShape, args: argparse.Namespace) -> dict[int, float]:
    """Generated tokens/s that the machine allows, per n."""
    return {
        n: throughput(n * args.output_len, run_s(machine, shape, n, args.input_len, args.output_len)) for n in args.n
    }


def show(results: dict[str, Measured], floor: dict[int, float], args: argparse.Namespace) -> None:
    work = f"{args.input_len} tokens in, {args.output_len} out, {args.dtype} weights, median of {args.rounds} rounds"
    found = table(("engine", *(f"n={n}" for n in args.n)))
    for name, result in results.items():
        found.add_row(name, *(_number(speeds(result, n, args.output_len), ",.1f") for n in args.n))
    found.add_row("floor", *(f"{floor[n]:,.1f}" for n in args.n), style="dim")
    show_table(f"{args.model}: generated tokens/s ({work})", found)
    if "octavo" not in results:
        return
    ratios = table(("octavo ÷", *(f"n={n}" for n in args.n)))
    peers = {name: result for name, result in results.items() if name != "octavo"}
    found_ratios = {name: [ratio(results["octavo"], peer, n) for n in args.n] for name, peer in peers.items()}
    for name, values in found_ratios.items():
        ratios.add_row(name, *(_number(value, ".2f") for value in values))
    if len(peers) > 1:
        fastest = map(least, zip(*found_ratios.values(), strict=True))
        ratios.add_row("the fastest of these", *(_number(value, ".2f") for value in fastest), style="bold")
    mine = {n: speeds(results["octavo"], n, args.output_len) for n in args.n}
    ratios.add_row("floor", *(_number(mine[n] and mine[n] / floor[n], ".2f") for n in args.n), style="dim")
    show_table("ratios of speed (median of the rounds' own ratios)", ratios)
    for name, peer in peers.items():
        for n in args.n:
            same, length = agreement(results["octavo"].token_ids.get(n, ()), peer.token_ids.get(n, ()))
            console.print(
                f"octavo and {name}, n={n}: first {AGREE_ON} tokens equal in {same:.0%} of the prompts, "
                f"{length:.1f} of {args.output_len} tokens on average before they part"
            )


def ratio(ours: Measured, theirs: Measured, n: int) -> float | None:
    """Our speed ÷ theirs, median of the rounds' own ratios: the two ran within a minute, so noise disturbs it least."""
    pairs = [b / a for a, b in zip(ours.seconds.get(n, ()), theirs.seconds.get(n, ()), strict=False)]
    return median(pairs) if pairs else None


def least(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def as_json(results: dict[str, Measured], args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, result in results.items():
        entry = {"versions": result.versions, "notes": result.notes, "load_s": result.load_s, "runs": {}}
        for n in args.n:
            entry["runs"][str(n)] = {
                "seconds": result.seconds.get(n, []),
                "output_throughput": speeds(result, n, args.output_len),
            }
            if name != "octavo" and "octavo" in results:
                entry["runs"][str(n)]["octavo_ratio"] = ratio(results["octavo"], result, n)
                same, length = agreement(results["octavo"].token_ids.get(n, ()), result.token_ids.get(n, ()))
                entry["runs"][str(n)] |= {"prompts_agreeing": same, "mean_common_tokens": length}
        found[name] = entry
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="octavo beside transformers and vllm: same machine, model, prompts.")
    parser.add_argument("--model", default="smollm2-135m", help="preset, folder, .gguf or hub id")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights as stored")
    parser.add_argument("--n", type=int, nargs="+", default=[1, 8, 32], help="prompts at once")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--venvs", type=Path, default=cache_dir() / "venvs", help="folder of the peers' venvs")
    parser.add_argument("--install", action="store_true", help="make the venvs that are missing (downloads ~1 GB)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each engine")
    parser.add_argument("--octavo-options", nargs="*", default=[], metavar="FIELD=VALUE", help="EngineConfig fields")
    parser.add_argument("--load-timeout", type=float, default=900, help="seconds an engine may take to load")
    parser.add_argument("--timeout", type=float, default=600, help="seconds one round of one engine may take")
    parser.add_argument("--output", type=Path, help="result file (default: build/benchmarks/)")
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    try:
        folder = model_folder(args.model, args.dtype)
        shape = model_shape(str(folder))
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from error
    found = pythons(args.engines, args.venvs, args.install)
    options = {"octavo": (json.dumps(engine_options(args.octavo_options)),)}
    engines = [engine(name, python, args.threads, options.get(name, ())) for name, python in found.items()]
    before = measure_machine()
    results = measure(engines, folder, args)
    machine = best_of(before, measure_machine())
    if not results:
        raise SystemExit("error: no engine could be measured.")
    floor = floors(machine, shape, args)
    console.print(f"this machine: {describe(machine)}")
    show(results, floor, args)
    content = {"machine": asdict(machine), "floor_output_throughput": floor, "engines": as_json(results, args)}
    save("peers", vars(args), content, args.output)


if __name__ == "__main__":
    main()

"""Where a decode step's time goes: every native op of a step, by its total, beside its floor.

    python benchmarks/profile_step.py --n 1 32

Runs the engine until a step of n rows has been recorded as a graph, then replays the graph with a clock around each op
(the least of --repeats for each, so that what the machine does besides is left out); the head is timed beside it. The
floor of an op is the larger of its bytes ÷ bandwidth and its operations ÷ peak, both measured in the same
run (the peak of int8 products where the weights are codes); ops that only pass over activations have none.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from floor import Machine, describe, measure_machine
from options import engine_options
from prompts import random_prompts
from report import console, save, show, table

from octavo.engine import LLM, SamplingParams
from octavo.engine.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of op in a step of n rows. floor_s None: too small to have one."""

    n: int
    name: str
    calls: int
    seconds: float
    floor_s: float | None


@dataclass(frozen=True, slots=True)
class Machines:
    """What the machine can do with float32 and with int8 products."""

    float32: Machine
    int8: Machine


def parts_of(n: int, times: Sequence[tuple[str, float]], floors: dict[str, float]) -> list[Part]:
    """times: (op, seconds) of every call. Largest first."""
    names = dict.fromkeys(name for name, _ in times)
    parts = [
        Part(n, name, len(of_name), sum(of_name), floors.get(name))
        for name in names
        if (of_name := [seconds for op, seconds in times if op == name])
    ]
    return sorted(parts, key=lambda part: -part.seconds)


def linear_labels(names: Sequence[str], per_layer: int) -> list[str]:
    """The calls of `linear` in a layer, told apart by their place: qkv, out, gate and up, down."""
    labels = ("linear qkv", "linear o", "linear gate_up", "linear down") if per_layer == 4 else ()
    seen, found = 0, []
    for name in names:
        if name == "linear" and labels:
            found.append(labels[seen % per_layer])
            seen += 1
        else:
            found.append(name)
    return found


def profile(llm: LLM, n: int, context: int, repeats: int, machines: Machines) -> list[Part]:
    """Raises ConfigError if the model's steps cannot be recorded."""
    process: Any = llm._engine.core.process
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, detokenize=False)
    llm.generate(random_prompts(n, context, llm.info.vocab_size, ("profile", n)), params, use_tqdm=False)
    runner = process._runner
    graph = runner.forward._graphs.get((n, n))
    if graph is None:
        raise ConfigError(f"No graph was recorded for n={n}: this model's decode steps are not native ops alone.")

    def least() -> list[tuple[str, float]]:
        runs = [graph.profile() for _ in range(repeats)]
        return [(calls[0][0], min(ns for _, ns in calls) / 1e9) for calls in zip(*runs, strict=True)]

    times = process._thread.submit(least).result()
    layers = sum(name == "paged_attention" for name, _ in times)
    per_layer = sum(name == "linear" for name, _ in times) // layers
    labels = linear_labels([name for name, _ in times], per_layer)
    named = list(zip(labels, (seconds for _, seconds in times), strict=True))
    hidden = graph.outputs.clone()
    named.append(("head", process._thread.submit(_least, lambda: runner.model.logits(hidden), repeats).result()))
    return parts_of(n, named, _floors(runner, n, context, machines, layers))


def _least(call: Callable[[], object], repeats: int) -> float:
    best = float("inf")
    with torch.inference_mode():
        for _ in range(repeats):
            begin = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - begin)
    return best


def _floors(runner: Any, n: int, context: int, machines: Machines, layers: int) -> dict[str, float]:
    """Seconds per kind of op of a whole step."""
    layer, head = runner.model.layers[0], runner.model.lm_head
    weights = {
        "linear qkv": (layers, layer.self_attn.qkv_proj.packed),
        "linear o": (layers, layer.self_attn.o_proj.packed),
        "linear gate_up": (layers, layer.mlp.gate_up_proj.packed),
        "linear down": (layers, layer.mlp.down_proj.packed),
        "head": (1, (head.tied[0] if head.tied else head).packed),
    }
    floors = {}
    for name, (times, packed) in weights.items():
        machine = machines.int8 if all(section.form >= 3 for section in packed.sections) else machines.float32
        floors[name] = times * machine.seconds(packed.nbytes, 2 * n * packed.outputs * packed.inputs)
    specs = runner.model.kv_specs()
    pairs = n * context * sum(runner.model.layers[0].self_attn.heads[0] * spec.head_size for spec in specs)
    floors["paged_attention"] = machines.float32.seconds(n * context * sum(s.bytes_per_token for s in specs), 4 * pairs)
    return floors


def show_parts(parts: Sequence[Part], n: int, context: int) -> None:
    total = sum(part.seconds for part in parts)
    columns = table(("op", "calls", "ms", "% of step", "floor ms", "÷ floor"))
    for part in parts:
        floor = "" if part.floor_s is None else f"{part.floor_s * 1e3:.2f}"
        times = "" if part.floor_s is None else f"{part.seconds / part.floor_s:.1f}"
        columns.add_row(
            part.name, str(part.calls), f"{part.seconds * 1e3:.2f}", f"{part.seconds / total:.1%}", floor, times
        )
    show(f"a decode step of n={n} at {context} tokens of context: {total * 1e3:.2f} ms in ops", columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="preset, folder, .gguf or hub id")
    parser.add_argument("--n", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--context", type=int, default=160, help="tokens of each sequence")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--options", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of EngineConfig")
    parser.add_argument("--output", type=Path, help="result file (default: build/benchmarks/)")
    args = parser.parse_args()
    machines = Machines(measure_machine(), measure_machine(dtype=torch.int8))
    console.print(describe(machines.float32))
    console.print(describe(machines.int8))
    settings = {"max_model_len": 1024, "enable_prefix_caching": False, **engine_options(args.options)}
    llm = LLM(args.model, **settings)
    found: list[Part] = []
    for n in args.n:
        parts = profile(llm, n, args.context, args.repeats, machines)
        show_parts(parts, n, args.context)
        found += parts
    save("profile_step", vars(args), [asdict(part) for part in found], args.output)


if __name__ == "__main__":
    main()

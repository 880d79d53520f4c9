"""What several ranks cost on this machine: the same work by one rank, tensor-parallel ranks and pipeline stages.

    python benchmarks/parallel.py [--model smollm2-135m] [--n 1 8 32]

Every layout has the same cores in all, each runs in a process of its own, in turns, and the greedy tokens are compared.
On one CPU more ranks cannot be faster: the table says what a rank's exchanges cost.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

from report import console
from rich.table import Table

LAYOUTS = {"one rank": (1, 1), "tp 2": (2, 1), "pp 2": (1, 2), "tp 2 × pp 2": (2, 2)}
INPUT_LEN, OUTPUT_LEN = 64, 32


def main() -> None:
    args = arguments()
    if args.layout is not None:
        print(json.dumps(measure(args, *LAYOUTS[args.layout])))
        return
    rates: dict[str, dict[int, list[float]]] = {name: {n: [] for n in args.n} for name in LAYOUTS}
    tokens: dict[str, Any] = {}
    for _ in range(args.rounds):
        for name in LAYOUTS:
            command = [sys.executable, __file__, "--layout", name, "--model", args.model, "--dtype", args.dtype]
            command += ["--quantization", args.quantization, "--n", *map(str, args.n)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
            if done.returncode:
                raise SystemExit(done.stderr[-2000:])
            result = json.loads(done.stdout.splitlines()[-1])
            tokens[name] = result["tokens"]
            for n in args.n:
                rates[name][n].append(result["rates"][str(n)])
    table = Table(title=f"{args.model}, {args.dtype}, {INPUT_LEN} in, {OUTPUT_LEN} out: tokens/s (÷ one rank)")
    table.add_column("layout")
    for n in args.n:
        table.add_column(f"n={n}", justify="right")
    table.add_column("tokens")
    for name in LAYOUTS:
        medians = {n: statistics.median(rates[name][n]) for n in args.n}
        alone = {n: statistics.median(rates["one rank"][n]) for n in args.n}
        same = "the same" if tokens[name] == tokens["one rank"] else "DIFFER"
        table.add_row(name, *(f"{medians[n]:.1f} ({medians[n] / alone[n]:.2f})" for n in args.n), same)
    console.print(table)


def measure(args: argparse.Namespace, tp: int, pp: int) -> dict[str, Any]:
    from octavo.engine import LLM, SamplingParams

    llm = LLM(
        args.model,
        dtype=args.dtype,
        quantization=args.quantization,
        max_model_len=256,
        kv_cache_memory_bytes=256 << 20,
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        enable_prefix_caching=False,
    )
    params = SamplingParams(temperature=0.0, max_tokens=OUTPUT_LEN, ignore_eos=True)
    rates, tokens = {}, []
    for n in args.n:
        prompts = [[(7 * i + 13 * j) % 40000 + 100 for i in range(INPUT_LEN)] for j in range(n)]
        llm.generate(prompts, params.replace(max_tokens=4), use_tqdm=False)
        begun = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        rates[n] = n * OUTPUT_LEN / (time.perf_counter() - begun)
        tokens.append([output.outputs[0].token_ids for output in outputs])
    llm.close()
    return {"rates": rates, "tokens": tokens}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quantization", default="auto")
    parser.add_argument("--n", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--layout", choices=LAYOUTS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()

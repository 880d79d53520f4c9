"""What the prefix cache saves: time to first token of a prompt whose beginning was seen before, and of one new.

    python benchmarks/prefix.py

For each of several random prefixes: one request with the prefix and a short suffix (cold), then others with the same
prefix and other suffixes (hits), one at a time, streamed through AsyncLLM. TTFT is from the call to the first token's
arrival. The ratio of a prefix is its cold TTFT ÷ the median of its hits; shown is the median over the prefixes.

Each format runs in a process of its own, from one Hugging Face folder with bfloat16 weights, as the hubs hold them.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from checkpoint import model_folder
from options import engine_options
from prompts import random_prompts
from report import console, save, show, table

from octavo.engine import AsyncLLM, SamplingParams
from octavo.engine.config import EngineConfig
from octavo.engine.errors import ConfigError

GOAL = 50.0


@dataclass(frozen=True, slots=True)
class Prefix:
    """TTFTs of the requests with one prefix. cached: tokens of the hits' prompts that were found, the least of them."""

    cold_s: float
    hits_s: tuple[float, ...]
    cached: int

    @property
    def ratio(self) -> float:
        return self.cold_s / median(self.hits_s)


async def ttft(llm: AsyncLLM, prompt: list[int]) -> tuple[float, int]:
    """(seconds from the call to the first token, prompt tokens found in the cache) of a request for one token."""
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    begin = time.perf_counter()
    seconds, cached = 0.0, 0
    async for output in llm.generate(prompt, params):
        seconds = seconds or time.perf_counter() - begin
        cached = output.num_cached_tokens or 0
    return seconds, cached


async def measure(llm: AsyncLLM, prefix_len: int, suffix_len: int, prefixes: int, hits: int) -> list[Prefix]:
    vocab = llm.info.vocab_size
    found = []
    for index in range(prefixes + 1):
        [prefix] = random_prompts(1, prefix_len, vocab, ("prefix", index))
        # Suffixes part at their first token, whatever is drawn after it.
        firsts = range(vocab // 2, vocab // 2 + hits + 1)
        rests = random_prompts(hits + 1, suffix_len - 1, vocab, ("suffix", index))
        prompts = [[*prefix, first, *rest] for first, rest in zip(firsts, rests, strict=True)]
        cold_s, unexpected = await ttft(llm, prompts[0])
        if unexpected:
            raise SystemExit(f"error: {unexpected} tokens of a prompt never seen were found in the cache.")
        later = [await ttft(llm, prompt) for prompt in prompts[1:]]
        found.append(Prefix(cold_s, tuple(s for s, _ in later), min(cached for _, cached in later)))
    return found[1:]  # the first one warms up


def run_format(settings: dict[str, Any], threads: int, work: tuple[int, int, int, int]) -> list[Prefix]:
    """One engine's prefixes, in this process. Raises ConfigError."""
    torch.set_num_threads(threads)
    llm = AsyncLLM(EngineConfig(**settings))
    try:
        return asyncio.run(measure(llm, *work))
    finally:
        llm.shutdown()


def show_results(results: dict[str, list[Prefix]], args: argparse.Namespace) -> None:
    shown = table(("weights", "cold TTFT", "hit TTFT", "cached tokens", "ratio", "min", "max", "goal", ""))
    for name, prefixes in results.items():
        ratios = [prefix.ratio for prefix in prefixes]
        shown.add_row(
            name,
            f"{1000 * median(prefix.cold_s for prefix in prefixes):.1f} ms",
            f"{1000 * median(hit for prefix in prefixes for hit in prefix.hits_s):.2f} ms",
            str(min(prefix.cached for prefix in prefixes)),
            f"{median(ratios):.1f}",
            f"{min(ratios):.1f}",
            f"{max(ratios):.1f}",
            f"{GOAL:.0f}",
            "[green]met[/green]" if median(ratios) >= GOAL else "[red]missed[/red]",
        )
    show(
        f"{args.model}: prefix of {args.prefix_len} tokens, suffix of {args.suffix_len}; medians of {args.prefixes} "
        f"prefixes, {args.hits} hits each",
        shown,
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time to first token with and without a prefix hit.")
    parser.add_argument("--model", default="smollm2-135m", help="preset, folder, .gguf, hub id, or fake")
    parser.add_argument("--quantization", nargs="+", default=["none", "int8"], help="of the weights, one engine each")
    parser.add_argument("--prefix-len", type=int, default=1000, help="tokens")
    parser.add_argument("--suffix-len", type=int, default=8, help="tokens")
    parser.add_argument("--prefixes", type=int, default=7)
    parser.add_argument("--hits", type=int, default=5, help="later requests per prefix")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--options", nargs="*", default=[], metavar="FIELD=VALUE", help="further EngineConfig fields")
    parser.add_argument("--output", type=Path, help="result file (default: build/benchmarks/)")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    work = (args.prefix_len, args.suffix_len, args.prefixes, args.hits)
    results: dict[str, list[Prefix]] = {}
    try:
        model = args.model if args.model == "fake" else str(model_folder(args.model, "bfloat16"))
        for quantization in args.quantization:
            settings = {"model": model, "dtype": args.dtype, "quantization": quantization, "max_num_seqs": 8}
            settings |= {"kv_cache_memory_bytes": 2**30, **engine_options(args.options)}
            name = args.dtype if quantization == "none" else quantization
            with console.status(name), ProcessPoolExecutor(1, mp_context=get_context("spawn")) as child:
                results[name] = child.submit(run_format, settings, args.threads, work).result()
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from error
    show_results(results, args)
    content = {
        name: {
            "ratio": median(prefix.ratio for prefix in prefixes),
            "goal": GOAL,
            "prefixes": [asdict(prefix) for prefix in prefixes],
        }
        for name, prefixes in results.items()
    }
    save("prefix", vars(args), content, args.output)


if __name__ == "__main__":
    main()

"""Decode in a long context, per type of the KV cache: python benchmarks/long_context.py

--n sequences of --context tokens each, all different, decode --output-len tokens through the whole engine. Then the
attention op alone is timed on the engine's own pool, layer after layer as in a step, each sequence in random blocks:
its share of the step, and how near it comes to its floor, the bytes of KV it must read ÷ the bandwidth of a sequential
read. That is measured between the op's calls: on a shared machine it changes from minute to minute. Medians.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from drive import Bench
from options import engine_options
from prompts import random_prompts
from report import console, save, show, table

from octavo.engine.config import EngineConfig
from octavo.engine.errors import ConfigError, RequestError
from octavo.engine.layers.attention import SelfAttention
from octavo.kernels.ops import AttentionBatch

KV_DTYPES = ("float32", "bfloat16", "int8")
READ_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one KV type, medians. kv_bytes: read by one decode step, of all layers. read_gbps: of a sequential read."""

    kv_dtype: str
    kv_bytes: int
    prefill_s: float
    step_s: float
    attention_s: float
    read_gbps: float

    @property
    def floor_s(self) -> float:
        return self.kv_bytes / (self.read_gbps * 1e9)

    @property
    def share(self) -> float:
        return self.attention_s / self.step_s

    @property
    def of_floor(self) -> float:
        """1 = as fast as memory can be read."""
        return self.floor_s / self.attention_s


def random_batch(num_blocks: int, block_size: int, n: int, context: int) -> AttentionBatch:
    """One token for each of n sequences, in blocks that nobody shares. Raises SystemExit if the pool is too small."""
    columns = -(-context // block_size)
    if n * columns > num_blocks:
        raise SystemExit(f"error: {n} contexts of {context} tokens need {n * columns} KV blocks, of {num_blocks}.")
    tables = torch.randperm(num_blocks, dtype=torch.int32)[: n * columns].view(n, columns)
    return AttentionBatch(
        block_tables=tables,
        query_start=torch.arange(n + 1, dtype=torch.int32),
        context_lens=torch.full((n,), context, dtype=torch.int32),
        slot_mapping=torch.full((n,), -1),
        max_query_len=1,
        max_context_len=context,
    )


@torch.inference_mode()
def time_attention(runner: Any, n: int, context: int, dtype: torch.dtype, repeats: int) -> tuple[float, float]:
    """Seconds of the attention op over all layers, and GB/s of a read, medians of `repeats` in turn.

    runner: of a local engine, its pool full.
    """
    layers = sorted(
        (module for module in runner.model.modules() if isinstance(module, SelfAttention)),
        key=lambda module: module.attention.index,
    )
    queries = [torch.randn(n, layer.heads[0], layer.head_size, dtype=dtype) for layer in layers]
    caches = [runner.pool.caches[layer.attention.index] for layer in layers]
    batch = random_batch(caches[0][0].shape[0], runner.pool.block_size, n, context)
    big = torch.ones(READ_BYTES // 4)
    times, reads = [], []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        for layer, query, (key_cache, value_cache) in zip(layers, queries, caches, strict=True):
            attention = layer.attention
            attention.paged_attention(
                query, key_cache, value_cache, batch, attention.scale, attention.window, attention.soft_cap
            )
        middle = time.perf_counter()
        big.sum()
        times.append(middle - begin)
        reads.append(time.perf_counter() - middle)
    return median(times[1:]), READ_BYTES / median(reads[1:]) / 1e9


def kv_bytes(runner: Any, n: int, context: int) -> int:
    """What one decode step reads: a layer with a window no more than that."""
    return sum(n * min(context, spec.window or context) * spec.bytes_per_token for spec in runner.model.kv_specs())


def measure(kv_dtype: str, args: argparse.Namespace) -> Measured:
    block_size = 16
    settings = {
        "model": args.model,
        "dtype": args.dtype,
        "kv_cache_dtype": kv_dtype,
        "block_size": block_size,
        "max_num_seqs": args.n,
        "max_model_len": args.context + args.output_len,
        "num_gpu_blocks_override": args.n * (-(-(args.context + args.output_len) // block_size) + 1),
        **engine_options(args.options),
    }
    bench = Bench(EngineConfig(**settings))
    try:
        prompts = random_prompts(args.n, args.context, bench.engine.info.vocab_size, ("long", args.context))
        with console.status(f"{kv_dtype}: engine"):
            prefill_s = bench.run(prompts, 1).wall_s
            run = bench.run(prompts, args.output_len)  # found in the prefix cache: all decode together
        steps = [step.wall_s for step in run.steps if step.decode and step.rows == args.n]
        process = bench.engine.core.process._process
        with console.status(f"{kv_dtype}: attention alone"):  # on the rank's thread: one OpenMP team
            attention_s, read_gbps = process._thread.submit(
                time_attention, process._runner, args.n, args.context, getattr(torch, args.dtype), args.repeats
            ).result()
        num_bytes = kv_bytes(process._runner, args.n, args.context)
    finally:
        bench.close()
    return Measured(kv_dtype, num_bytes, prefill_s, median(steps), attention_s, read_gbps)


def show_results(found: Sequence[Measured], args: argparse.Namespace) -> None:
    shown = table(
        (
            "KV",
            "KV per step",
            "prefill",
            "decode step",
            "attention",
            "of the step",
            "read",
            "KV floor",
            "of the floor's speed",
        )
    )
    for one in found:
        shown.add_row(
            one.kv_dtype,
            f"{one.kv_bytes / 2**20:,.0f} MiB",
            f"{one.prefill_s:.1f} s",
            f"{1000 * one.step_s:.1f} ms",
            f"{1000 * one.attention_s:.1f} ms",
            f"{one.share:.0%}",
            f"{one.read_gbps:.1f} GB/s",
            f"{1000 * one.floor_s:.1f} ms",
            f"{one.of_floor:.0%}",
        )
    show(f"{args.model} {args.dtype}: decode of n={args.n} in a context of {args.context:,} tokens", shown)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Decode in a long context, per type of the KV cache.")
    parser.add_argument("--model", default="smollm2-135m", help="preset, folder, .gguf or hub id")
    parser.add_argument("--n", type=int, default=8, help="sequences at once")
    parser.add_argument("--context", type=int, default=4096, help="prompt tokens of each")
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=15, help="of the attention op alone")
    parser.add_argument("--kv-dtypes", nargs="+", default=list(KV_DTYPES), choices=KV_DTYPES)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--options", nargs="*", default=[], metavar="FIELD=VALUE", help="further EngineConfig fields")
    parser.add_argument("--output", type=Path, help="result file (default: build/benchmarks/)")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    try:
        found = [measure(kv_dtype, args) for kv_dtype in args.kv_dtypes]
    except (ConfigError, RequestError) as error:
        raise SystemExit(f"error: {error}") from error
    show_results(found, args)
    rows = [{**asdict(one), "floor_s": one.floor_s, "share": one.share, "of_floor": one.of_floor} for one in found]
    save("long_context", vars(args), rows, args.output)


if __name__ == "__main__":
    main()

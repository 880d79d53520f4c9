"""Native CPU kernels against `ref` and against the machine's floor, in one run: python benchmarks/kernels_cpu.py

The floor of a case is the larger of its bytes over the memory bandwidth (of a sequential read) and its multiply-adds
over the peak (of a float32 matmul), both measured in this run with torch. Every call works on the next of LAYERS sets
of tensors, as a model's layers would. A case whose sets fit the caches together can beat a floor made of bandwidth, and
a matmul is not the best the machine can do. Times are medians of single calls, Python included.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from statistics import median

import torch

from octavo.kernels import cpu, ref
from octavo.kernels.ops import AttentionBatch

LAYERS = 30
HEADS, KV_HEADS, HEAD_SIZE, WIDTH, FFN, BLOCK_SIZE = 9, 3, 64, 576, 1536, 16  # SmolLM2-135M


@dataclass(frozen=True)
class Machine:
    """Measured: bytes/s of a read, multiply-adds/s of a float32 matmul."""

    bandwidth: float
    peak: float


@dataclass(frozen=True)
class Case:
    """`arguments`: one tuple per set. num_bytes and multiply_adds are those of one call."""

    op: str
    shape: str
    arguments: list[tuple[object, ...]]
    num_bytes: float
    multiply_adds: float = 0.0


def seconds(call: Callable[..., object], arguments: list[tuple[object, ...]], budget: float) -> float:
    """Median time of a call, over at least 7 calls and about `budget` seconds."""
    call(*arguments[0])
    times: list[float] = []
    end = time.perf_counter() + budget
    for some in cycle(arguments):
        begin = time.perf_counter()
        call(*some)
        now = time.perf_counter()
        times.append(now - begin)
        if now > end and len(times) >= 7:
            return median(times)
    raise AssertionError


def measure(budget: float) -> Machine:
    big = torch.ones(1 << 26)
    read = big.numel() * 4 / seconds(big.sum, [()], budget)
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return Machine(read, 1024**3 / seconds(torch.matmul, [(a, b)], budget))


def attention_case(dtype: torch.dtype, sequences: int, query: int, context: int) -> Case:
    per_sequence = -(-context // BLOCK_SIZE)
    num_blocks = sequences * per_sequence
    cache_bytes = 2 * num_blocks * KV_HEADS * BLOCK_SIZE * HEAD_SIZE * dtype.itemsize
    sets = max(2, min(LAYERS, int(1e9 / cache_bytes)))
    caches = torch.randn(sets, 2, num_blocks, KV_HEADS, BLOCK_SIZE, HEAD_SIZE).to(dtype)
    batch = AttentionBatch(
        block_tables=torch.randperm(num_blocks).to(torch.int32).view(sequences, per_sequence),
        query_start=torch.arange(0, sequences * query + 1, query, dtype=torch.int32),
        context_lens=torch.full((sequences,), context, dtype=torch.int32),
        slot_mapping=torch.zeros(sequences * query, dtype=torch.int64),
        max_query_len=query,
        max_context_len=context,
    )
    fused = torch.randn(sequences * query, (HEADS + 2 * KV_HEADS) * HEAD_SIZE).to(dtype)
    q = fused[:, : HEADS * HEAD_SIZE].view(-1, HEADS, HEAD_SIZE)
    seen = sequences * sum(context - i for i in range(query))
    kind = "decode" if query == 1 else "prefill"
    return Case(
        "paged_attention",
        f"{kind} n={sequences} q={query} ctx={context}",
        [(q, keys, values, batch, 0.125) for keys, values in caches],
        2 * sequences * context * KV_HEADS * HEAD_SIZE * dtype.itemsize,
        2 * seen * HEADS * HEAD_SIZE,
    )


def row_cases(dtype: torch.dtype, tokens: int) -> list[Case]:
    size = dtype.itemsize
    qkv = torch.randn(LAYERS, tokens, HEADS + 2 * KV_HEADS, HEAD_SIZE).to(dtype)
    x, residual = torch.randn(2, LAYERS, tokens, WIDTH).to(dtype)
    gates = torch.randn(LAYERS, tokens, 2 * FFN).to(dtype)
    weight = torch.ones(WIDTH).to(dtype)
    positions, cos_sin = torch.arange(tokens), torch.randn(4096, HEAD_SIZE)
    num_blocks = -(-tokens // BLOCK_SIZE) + 64
    caches = torch.zeros(LAYERS, 2, num_blocks, KV_HEADS, BLOCK_SIZE, HEAD_SIZE, dtype=dtype)
    slots = torch.randperm(num_blocks * BLOCK_SIZE)[:tokens]
    q, k, v = qkv.split((HEADS, KV_HEADS, KV_HEADS), dim=2)
    heads = HEADS + KV_HEADS

    def case(op: str, values: int, arguments: Callable[[int], tuple[object, ...]]) -> Case:
        return Case(op, f"T={tokens}", [arguments(i) for i in range(LAYERS)], values * size)

    return [
        case("rms_norm", 2 * tokens * WIDTH, lambda i: (x[i], weight, 1e-5)),
        case("add_rms_norm", 4 * tokens * WIDTH, lambda i: (x[i], residual[i], weight, 1e-5)),
        case("rotary", 2 * tokens * heads * HEAD_SIZE, lambda i: (q[i], k[i], positions, cos_sin)),
        case("write_kv", 4 * tokens * KV_HEADS * HEAD_SIZE, lambda i: (k[i], v[i], caches[i, 0], caches[i, 1], slots)),
        case("silu_and_mul", 3 * tokens * FFN, lambda i: (gates[i],)),
        case("gelu_tanh_and_mul", 3 * tokens * FFN, lambda i: (gates[i],)),
    ]


def copy_case(dtype: torch.dtype) -> Case:
    caches = torch.zeros(LAYERS, 2, 64, KV_HEADS, BLOCK_SIZE, HEAD_SIZE, dtype=dtype)
    pairs = torch.tensor([(i, 32 + i) for i in range(8)])
    return Case(
        "copy_blocks",
        "8 blocks",
        [(keys, values, pairs) for keys, values in caches],
        4 * 8 * KV_HEADS * BLOCK_SIZE * HEAD_SIZE * dtype.itemsize,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", help="avx512, avx2 or base; default: the best")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--budget", type=float, default=0.2, help="seconds per measurement")
    parser.add_argument("--only", default="", help="substring of the op's name")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    body = cpu.load(options.isa)
    if body is None:
        raise SystemExit("No CPU library was built.")
    dtype = getattr(torch, options.dtype)
    machine = measure(options.budget)
    print(
        f"{body.isa}, {options.dtype}, {options.threads} threads; read {machine.bandwidth / 1e9:.1f} GB/s, "
        f"matmul {2 * machine.peak / 1e9:.0f} GFLOP/s"
    )
    print(f"{'op':18}{'shape':26}{'ours µs':>10}{'ref µs':>10}{'ref/ours':>10}{'floor µs':>10}{'floor/ours':>11}")
    makers: list[Callable[[], list[Case]]] = [lambda t=t: row_cases(dtype, t) for t in (1, 8, 32, 512)]
    makers.append(lambda: [copy_case(dtype)])
    shapes = [(n, 1, context) for context in (192, 4096) for n in (1, 8, 32)] + [
        (1, 512, 512),
        (1, 512, 4096),
        (4, 16, 1024),
    ]
    makers += [lambda s=s: [attention_case(dtype, *s)] for s in shapes]
    for make in makers:
        for case in make():
            if options.only not in case.op:
                continue
            ours, theirs = (seconds(getattr(one, case.op), case.arguments, options.budget) for one in (body, ref))
            floor = max(case.num_bytes / machine.bandwidth, case.multiply_adds / machine.peak)
            print(
                f"{case.op:18}{case.shape:26}{ours * 1e6:10.1f}{theirs * 1e6:10.1f}{theirs / ours:10.2f}"
                f"{floor * 1e6:10.1f}{floor / ours:11.2f}"
            )


if __name__ == "__main__":
    main()

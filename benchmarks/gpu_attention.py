"""Triton's attention and row-wise ops on a GPU: python benchmarks/gpu_attention.py

Correctness first: every case is compared with `ref`, at the shape that is then measured. A rate is the bytes or
floating point operations that the case cannot do without over the time of one call; beside it stands what this run
measured of the device: a copy (bytes read and written) or a bfloat16 matmul of 8192³. Prefill stands beside the fastest
of torch's scaled_dot_product_attention, whose K and V are contiguous and repeated per query head beforehand.

Calls are captured in a CUDA graph over several sets of tensors, larger than the L2 cache together, and replayed: no
host time is in a figure. Medians of replays.

--tune tries other tiles for paged attention and prints the best as lines of octavo.kernels.triton.tiles. --interpret
checks tiny shapes on the CPU in Triton's interpreter, and measures nothing.
"""

from __future__ import annotations

import argparse
import importlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_timing import Device, measure_device, seconds_of, sets_of
from report import save
from torch.nn.attention import SDPBackend, sdpa_kernel

from octavo.kernels import ref
from octavo.kernels.ops import AttentionBatch

HEADS, KV_HEADS, HEAD_SIZE, WIDTH, FFN, BLOCK_SIZE = 32, 8, 128, 4096, 14336, 16  # Llama 3.1 8B
# Of an element, absolute and relative; and of the whole, which says more where long contexts make small numbers.
TOLERANCE = {torch.float32: (2e-5, 1e-5), torch.bfloat16: (1.6e-2, 1e-2)}

Arguments = tuple[Any, ...]
Op = Callable[..., Any]


@dataclass(frozen=True)
class Layer:
    """Where tensors are, and the sizes of a model's layer."""

    heads: int = HEADS
    kv_heads: int = KV_HEADS
    head_size: int = HEAD_SIZE
    width: int = WIDTH
    ffn: int = FFN
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16


LLAMA = Layer()


@dataclass(frozen=True)
class Case:
    """`make` gives the arguments of one call. Either num_bytes or flops is what the call is measured by.

    goal: of the device's rate, or of torch's attention where `rival` makes a call of it.
    """

    op: str
    shape: str
    make: Callable[[], Arguments]
    num_bytes: float = 0.0
    flops: float = 0.0
    goal: float | None = None
    rival: Callable[[Arguments], list[tuple[str, Callable[[], Any]]]] | None = None
    copies: bool = False  # the op changes its arguments


@dataclass(frozen=True)
class Result:
    """Times in µs; rate in GB/s or TFLOP/s. share: of the device's, `ratio`: of the rival's rate."""

    op: str
    shape: str
    us: float
    rate: float
    unit: str
    share: float
    ratio: float | None
    rival: str | None
    goal: float | None


def attention(
    rows: Sequence[tuple[int, int]], kv_dtype: torch.dtype, device: str, dtype: torch.dtype, heads: tuple[int, int, int]
) -> Arguments:
    """Arguments of paged_attention for rows of (query, context); heads: (Hq, Hkv, D)."""
    num_heads, kv_heads, head_size = heads
    counts = [-(-context // BLOCK_SIZE) for _, context in rows]
    order = torch.randperm(sum(counts), dtype=torch.int32, device=device)
    tables = torch.zeros(len(rows), max(counts), dtype=torch.int32, device=device)
    for s, count in enumerate(counts):
        tables[s, :count], order = order[:count], order[count:]
    row_size = head_size + (4 if kv_dtype.itemsize == 1 else 0)
    caches = torch.empty(2, sum(counts), kv_heads, BLOCK_SIZE, row_size, dtype=kv_dtype, device=device)
    at_once = 1024  # blocks
    for first in range(0, sum(counts), at_once):
        some = caches[:, first : first + at_once]
        slots = torch.arange(some.shape[1] * BLOCK_SIZE, device=device)
        new = torch.randn(2, len(slots), kv_heads, head_size, device=device).to(dtype)
        ref.write_kv(new[0], new[1], some[0], some[1], slots)
    lengths = torch.tensor([0] + [length for length, _ in rows])
    batch = AttentionBatch(
        block_tables=tables,
        query_start=lengths.cumsum(0).to(torch.int32).to(device),
        context_lens=torch.tensor([context for _, context in rows], dtype=torch.int32, device=device),
        slot_mapping=torch.zeros(int(lengths.sum()), dtype=torch.int64, device=device),
        max_query_len=max(length for length, _ in rows),
        max_context_len=max(context for _, context in rows),
    )
    query = torch.randn(int(lengths.sum()), num_heads, head_size, device=device).to(dtype)
    return query, caches[0], caches[1], batch, head_size**-0.5


def sdpa_of(arguments: Arguments) -> list[tuple[str, Callable[[], Any]]]:
    """Calls of torch's attention for one whole prompt of the same shape, one per backend."""
    (length, heads, head_size), like = arguments[0].shape, arguments[0]
    query, key, value = torch.randn(3, 1, heads, length, head_size, device=like.device).to(like.dtype)

    def call(backend: SDPBackend) -> Any:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    backends = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
    if like.device.type == "cpu":
        backends = (SDPBackend.MATH,)
    return [(backend.name, partial(call, backend)) for backend in backends]


def attention_case(
    name: str,
    rows: Sequence[tuple[int, int]],
    kv_dtype: torch.dtype | None = None,
    goal: float | None = None,
    layer: Layer = LLAMA,
) -> Case:
    """Measured by bytes of KV where all rows have one query, else by floating point operations. kv_dtype: None = as the
    queries."""
    stored = kv_dtype or layer.dtype
    heads, kv_heads, head_size = sizes = layer.heads, layer.kv_heads, layer.head_size
    make = partial(attention, rows, stored, layer.device, layer.dtype, sizes)
    shape = f"{name} {str(stored).removeprefix('torch.')}"
    if all(length == 1 for length, _ in rows):
        row_bytes = (head_size + 4) if stored.itemsize == 1 else head_size * stored.itemsize
        kv = 2 * sum(context for _, context in rows) * kv_heads * row_bytes
        asked = 2 * layer.dtype.itemsize * len(rows) * heads * head_size
        return Case("paged_attention", shape, make, num_bytes=kv + asked, goal=goal)
    seen = sum(length * context - length * (length - 1) // 2 for length, context in rows)
    whole = len(rows) == 1 and rows[0][0] == rows[0][1]
    rival = sdpa_of if whole and kv_dtype is None else None
    return Case("paged_attention", shape, make, flops=4 * seen * heads * head_size, goal=goal, rival=rival)


def attention_cases() -> list[Case]:
    ragged = [(1, 64 + 251 * i) for i in range(64)]
    return [
        attention_case("decode n=64 ctx=8192", [(1, 8192)] * 64, goal=0.90),
        attention_case("decode n=64 ctx=8192", [(1, 8192)] * 64, torch.float8_e4m3fn, goal=0.85),
        attention_case("decode n=64 ctx=8192", [(1, 8192)] * 64, torch.int8),
        attention_case("decode n=64 ragged", ragged),
        attention_case("decode n=256 ctx=1024", [(1, 1024)] * 256),
        attention_case("decode n=8 ctx=32768", [(1, 32768)] * 8),
        attention_case("decode n=1 ctx=8192", [(1, 8192)]),
        attention_case("decode n=1 ctx=131072", [(1, 131072)]),
        attention_case("prefill 8192", [(8192, 8192)], goal=1.0),
        attention_case("prefill 8192", [(8192, 8192)], torch.float8_e4m3fn),
        attention_case("prefill 16 × 512", [(512, 512)] * 16),
        attention_case("chunk 512 of 8192", [(512, 8192)]),
        attention_case("63 decode, chunk 1024", [(1, 2048)] * 63 + [(1024, 4096)]),
    ]


def row_cases(tokens: int, goal: float | None, layer: Layer = LLAMA) -> list[Case]:
    heads, kv_heads, head_size = layer.heads, layer.kv_heads, layer.head_size
    size = layer.dtype.itemsize

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=layer.device).to(layer.dtype)

    def qkv() -> tuple[torch.Tensor, ...]:
        return randn(tokens, heads + 2 * kv_heads, head_size).split((heads, kv_heads, kv_heads), dim=1)

    def rotary() -> Arguments:
        positions = torch.randint(0, 8192, (tokens,), device=layer.device)
        return (*qkv()[:2], positions, torch.randn(8192, head_size, device=layer.device))

    def write_kv(dtype: torch.dtype) -> Arguments:
        blocks = -(-tokens // BLOCK_SIZE)
        row_size = head_size + (4 if dtype.itemsize == 1 else 0)
        caches = torch.zeros(2, blocks, kv_heads, BLOCK_SIZE, row_size, dtype=dtype, device=layer.device)
        return (*qkv()[1:], *caches, torch.randperm(blocks * BLOCK_SIZE, device=layer.device)[:tokens])

    weight, shape = randn(layer.width), f"T={tokens}"
    kv, of_width = tokens * kv_heads * head_size, tokens * layer.width
    return [
        Case("rms_norm", shape, lambda: (randn(tokens, layer.width), weight, 1e-5), 2 * size * of_width, goal=goal),
        Case(
            "add_rms_norm",
            shape,
            lambda: (randn(tokens, layer.width), randn(tokens, layer.width), weight, 1e-5),
            4 * size * of_width,
            goal=goal,
            copies=True,
        ),
        Case("rotary", shape, rotary, 2 * size * tokens * (heads + kv_heads) * head_size, goal=goal, copies=True),
        Case("silu_and_mul", shape, lambda: (randn(tokens, 2 * layer.ffn),), 3 * size * tokens * layer.ffn, goal=goal),
        Case("write_kv", f"{shape} as it is", partial(write_kv, layer.dtype), 4 * size * kv),
        Case("write_kv", f"{shape} float8_e4m3fn", partial(write_kv, torch.float8_e4m3fn), 2 * (size + 1) * kv),
    ]


def check(case: Case, op: Op) -> None:
    """Raises AssertionError where the op differs from `ref` beyond the tolerance of its type."""
    arguments = case.make()
    theirs = tuple(x.clone() if case.copies and isinstance(x, torch.Tensor) else x for x in arguments)
    if case.op == "write_kv":
        found, expected = arguments[2:4], tuple(torch.zeros_like(cache) for cache in arguments[2:4])
        ref.write_kv(*arguments[:2], *expected, arguments[4])
        op(*arguments)
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(found, expected, strict=True))
        return
    expected = getattr(ref, case.op)(*theirs)
    found = op(*arguments)
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    for actual, wanted in pairs:
        tolerance, whole = TOLERANCE[wanted.dtype]
        torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)
        error = float((actual.float() - wanted.float()).norm() / wanted.float().norm())
        assert error <= whole, f"{case.op} {case.shape}: error {error:.1e} of the norm"


def measure(case: Case, op: Op, device: Device) -> Result:
    first = case.make()
    size = sum(x.nbytes for x in first if isinstance(x, torch.Tensor))
    sets = [first] + [case.make() for _ in range(sets_of(size) - 1)]
    took = seconds_of([partial(op, *some) for some in sets])
    rate, best, unit = (
        (case.flops / took, device.matmul, "TFLOP/s") if case.flops else (case.num_bytes / took, device.copy, "GB/s")
    )
    ratio, name = None, None
    for rival, call in case.rival(first) if case.rival else []:
        try:
            theirs = seconds_of([call] * 4)
        except RuntimeError as error:  # torch's way to say that a backend cannot
            print(f"  {rival}: {str(error).splitlines()[0][:90]}")
            continue
        if ratio is None or theirs / took < ratio:
            ratio, name = theirs / took, rival
    scale = 1e12 if case.flops else 1e9
    return Result(case.op, case.shape, took * 1e6, rate / scale, unit, rate / best, ratio, name, case.goal)


def line(result: Result) -> str:
    reached = result.share if result.ratio is None else result.ratio
    verdict = (
        "" if result.goal is None else f"goal {result.goal:.2f} {'reached' if reached >= result.goal else 'MISSED'}"
    )
    beside = "" if result.ratio is None else f"{result.ratio:.2f} × {result.rival}  "
    return (
        f"{result.op:17}{result.shape:38}{result.us:10.1f} µs{result.rate:9.1f} {result.unit:8}"
        f"{result.share:6.2f} of device  {beside}{verdict}"
    )


def tune(op: Op, device: Device, only: str) -> None:
    """Prints lines of octavo.kernels.triton.tiles, for this device."""
    gpu_tiles = importlib.import_module("gpu_tiles")
    tiles = gpu_tiles.tiles
    capability = tiles.capability(torch.device("cuda"))
    for case in attention_cases():
        if only not in case.shape:
            continue
        sizes = product((64, 128) if case.flops else (16,), (32, 64, 128), (4, 8), (1, 2, 3))
        found = gpu_tiles.try_tiles(
            kernel := "prefill 2" if case.flops else "decode 2",
            [
                tiles.AttentionTile(*size, programs)
                for size in sizes
                for programs in ((0,) if case.flops else (2, 4, 8))
            ],
            lambda case=case: measure(replace(case, rival=None), op, device).us / 1e6,
        )
        what = f"{case.shape}, {torch.cuda.get_device_name()}"
        print(gpu_tiles.lines(kernel, capability, HEAD_SIZE, found, what), flush=True)


def interpret(triton_ops: Any) -> None:
    shapes = ([(1, 40), (1, 300)], [(20, 50)], [(1, 17), (24, 24)])
    for rows, kv_dtype in product(shapes, (torch.float32, torch.int8)):
        arguments = attention(rows, kv_dtype, "cpu", torch.float32, (4, 2, 64))
        begin = time.perf_counter()
        check(Case("paged_attention", "", lambda made=arguments: made), triton_ops.paged_attention)
        print(f"paged_attention {rows} {kv_dtype}: as ref, {time.perf_counter() - begin:.1f} s in the interpreter")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="substring of op and shape")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--interpret", action="store_true")
    parser.add_argument("--output", type=Path, help="result file (default: build/benchmarks/)")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
        interpret(importlib.import_module("octavo.kernels.triton"))
        return
    if not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device here. --interpret checks the kernels without one.")
    triton_ops = importlib.import_module("octavo.kernels.triton")
    name, device = torch.cuda.get_device_name(), measure_device()
    print(f"{name}: copy {device.copy / 1e9:.0f} GB/s, bfloat16 matmul {device.matmul / 1e12:.0f} TFLOP/s")
    if options.tune:
        tune(triton_ops.paged_attention, device, options.only)
        return
    cases = [*attention_cases(), *row_cases(8192, 0.90), *row_cases(64, None)]
    cases = [case for case in cases if options.only in f"{case.op} {case.shape}"]
    for case in cases:
        check(case, getattr(triton_ops, case.op))
    print(f"{len(cases)} cases are as ref has them.")
    results: list[Result] = []
    for case in cases:
        results.append(measure(case, getattr(triton_ops, case.op), device))
        print(line(results[-1]), flush=True)
    found = {"device": asdict(device), "cases": [asdict(result) for result in results]}
    save("gpu_attention", vars(options), found, options.output)


if __name__ == "__main__":
    main()

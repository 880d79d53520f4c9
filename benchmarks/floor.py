"""The floor: what this machine could do at best, so that every result can be judged against it.

    python benchmarks/floor.py [MODEL]

Measures GFLOP/s (torch's matmuls, float32) and GB/s (read and copy of arrays larger than the caches) in this process,
and computes from a model's size how fast its prefill and its decode could be: the larger of bytes ÷ bandwidth and
operations ÷ peak. Assumes that weights are read once per step and activations cost nothing; nothing real reaches it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import torch

# [M, K] @ [K, N] of the measured matmuls: prefill chunks through a small model's layers, and a cube. Each takes few
# milliseconds, so that on a busy machine some of them run undisturbed.
MATMULS = ((256, 576, 1536), (512, 1536, 576), (1024, 1024, 1024))
ARRAY_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True)
class Machine:
    """Measured with `threads` threads; the best of several tries each. `dtype`: of the matmuls."""

    gflops: float
    read_gbps: float
    copy_gbps: float
    threads: int
    dtype: str = "float32"

    def seconds(self, num_bytes: float, operations: float) -> float:
        """The least time for reading so many bytes and doing so many operations, side by side."""
        return max(num_bytes / (self.read_gbps * 1e9), operations / (self.gflops * 1e9))


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a step must read and compute. Parameters that are only looked up (untied embeddings) are not counted.

    layer_parameters: of all matrices every token passes; head_parameters: of the head, computed for sampled rows only.
    kv_bytes_per_token: of all layers. attention_width: query heads × head size × layers.
    """

    layer_parameters: int
    head_parameters: int
    bytes_per_parameter: float
    kv_bytes_per_token: int
    attention_width: int

    @property
    def weight_bytes(self) -> float:
        return (self.layer_parameters + self.head_parameters) * self.bytes_per_parameter


def prefill_s(machine: Machine, shape: ModelShape, rows: int, length: int) -> float:
    """The least time for the prompts of `rows` sequences of `length` tokens each, and a first token for each."""
    tokens = rows * length
    pairs = rows * length * (length + 1) / 2  # (query, key) pairs under the causal mask
    operations = (
        2 * shape.layer_parameters * tokens + 2 * shape.head_parameters * rows + 4 * shape.attention_width * pairs
    )
    return machine.seconds(shape.weight_bytes + tokens * shape.kv_bytes_per_token, operations)


def decode_s(machine: Machine, shape: ModelShape, rows: int, context: float) -> float:
    """The least time of one decode step of `rows` sequences with `context` tokens of KV each."""
    operations = rows * (2 * (shape.layer_parameters + shape.head_parameters) + 4 * shape.attention_width * context)
    return machine.seconds(shape.weight_bytes + rows * context * shape.kv_bytes_per_token, operations)


def run_s(machine: Machine, shape: ModelShape, rows: int, input_len: int, output_len: int) -> float:
    """The least time of a whole run: prefill gives each row its first token, a decode step each of the others."""
    steps = output_len - 1
    mean_context = input_len + output_len / 2
    return prefill_s(machine, shape, rows, input_len) + steps * decode_s(machine, shape, rows, mean_context)


def measure_machine(budget_s: float = 4.0, dtype: torch.dtype = torch.float32) -> Machine:
    """Takes about `budget_s` seconds and 1 GiB. Set the number of threads (torch) before.

    Measures in a process of its own: OpenMP workers that this left behind would slow down an engine in this one.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as child:
        return child.submit(_measure, budget_s, dtype, torch.get_num_threads()).result()


@torch.inference_mode()
def _measure(budget_s: float, dtype: torch.dtype, threads: int) -> Machine:
    torch.set_num_threads(threads)
    share = budget_s / (2 * len(MATMULS) + 2)
    gflops = max(2 * m * k * n / _best_s(call, share) / 1e9 for m, k, n in MATMULS for call in _matmuls(m, k, n, dtype))
    source = torch.ones(ARRAY_BYTES // 4)
    target = torch.empty_like(source)
    read_s = _best_s(lambda: source.sum(), share)
    copy_s = _best_s(lambda: target.copy_(source), share)
    return Machine(
        gflops=gflops,
        read_gbps=ARRAY_BYTES / read_s / 1e9,
        copy_gbps=2 * ARRAY_BYTES / copy_s / 1e9,
        threads=torch.get_num_threads(),
        dtype=str(dtype).removeprefix("torch."),
    )


def best_of(*machines: Machine) -> Machine:
    """The best of each figure, of measurements taken at several moments of one run."""
    return Machine(
        gflops=max(m.gflops for m in machines),
        read_gbps=max(m.read_gbps for m in machines),
        copy_gbps=max(m.copy_gbps for m in machines),
        threads=machines[0].threads,
        dtype=machines[0].dtype,
    )


def _matmuls(m: int, k: int, n: int, dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    """The libraries torch has for a matmul; MKL reaches half of oneDNN's speed on some processors."""
    if dtype == torch.int8:
        a, b = (torch.randint(-127, 128, size, dtype=dtype) for size in ((m, k), (n, k)))
        yield lambda: torch._int_mm(a, b.T)
        return
    x, weight = torch.rand(m, k, dtype=dtype), torch.rand(n, k, dtype=dtype)
    yield lambda: x @ weight.T
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, m)
        torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    except (RuntimeError, AttributeError):
        return  # a torch without oneDNN
    yield lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def _best_s(call: Callable[[], object], budget_s: float) -> float:
    call()
    best = float("inf")
    end = time.perf_counter() + budget_s
    while time.perf_counter() < end:
        begin = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begin)
    return best


def describe(machine: Machine) -> str:
    operations = "GOP/s" if machine.dtype == "int8" else "GFLOP/s"
    return (
        f"{machine.gflops:,.0f} {operations} {machine.dtype} matmul, {machine.read_gbps:.1f} GB/s read, "
        f"{machine.copy_gbps:.1f} GB/s copy, {machine.threads} threads"
    )


def main() -> None:
    from checkpoint import model_shape
    from report import console, show, table

    parser = argparse.ArgumentParser(description="Measure the machine, and what a model could do on it at best.")
    parser.add_argument("model", nargs="?", default="smollm2-135m", help="preset, folder, .gguf or hub id; '' = none")
    parser.add_argument("--n", type=int, nargs="+", default=[1, 8, 32], help="sequences at once")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--threads", type=int, help="torch threads (default: all cores)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype: torch.dtype = getattr(torch, args.dtype)
    machine = measure_machine(dtype=dtype)
    console.print(describe(machine))
    if not args.model:
        return
    shape = model_shape(args.model, dtype)
    found = table(
        ("n", "prefill tokens/s", "decode step ms", "decode tokens/s", "whole run, generated tokens/s"),
    )
    for n in args.n:
        step = decode_s(machine, shape, n, args.input_len + args.output_len / 2)
        found.add_row(
            str(n),
            f"{n * args.input_len / prefill_s(machine, shape, n, args.input_len):,.0f}",
            f"{1000 * step:.1f}",
            f"{n / step:,.0f}",
            f"{n * args.output_len / run_s(machine, shape, n, args.input_len, args.output_len):,.0f}",
        )
    show(f"floor of {args.model}: {args.input_len} tokens in, {args.output_len} out", found)


if __name__ == "__main__":
    main()

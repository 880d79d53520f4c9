"""Which matmul serves a linear layer best on this CPU, at decode and prefill sizes: python benchmarks/matmul_cpu.py

Every call takes the next of several weights, more of them than the caches hold, as a model's layers would. Times are
medians of single calls. GB/s counts the weight once, GFLOP/s two operations per multiply-add. The last table adds up a
whole model's linear layers per step. "prepacked" weights are kept in oneDNN's own blocked layout, one for every number
of rows.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F

# SmolLM2-135M: shape of a weight → layers that have it.
MODEL = {
    (576, 960): 30,
    (576, 576): 30,
    (576, 3072): 30,
    (1536, 576): 30,
    (576, 49152): 1,
}
WEIGHT_BYTES = 256 << 20  # of all copies of one weight together
ROWS = (1, 8, 32, 128, 512)

Call = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Method:
    """One way to multiply. `pack` turns a weight [out, in] into what `call(x [rows, in], packed)` takes."""

    name: str
    dtype: torch.dtype
    call: Call
    pack: Callable[[torch.Tensor], torch.Tensor] = lambda weight: weight
    scope: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext


def onednn(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def pack_onednn(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)


def methods() -> list[Method]:
    float32, bfloat16 = torch.float32, torch.bfloat16

    def no_onednn() -> contextlib.AbstractContextManager[object]:
        return torch.backends.mkldnn.flags(enabled=False)

    found = [
        Method("f32 F.linear", float32, F.linear),
        Method("f32 MKL", float32, F.linear, scope=no_onednn),
        Method("f32 oneDNN", float32, onednn),
        Method("f32 oneDNN prepacked", float32, onednn, pack_onednn),
        Method("bf16 F.linear", bfloat16, F.linear),
        Method("bf16 without oneDNN", bfloat16, F.linear, scope=no_onednn),
        Method("bf16 oneDNN prepacked", bfloat16, onednn, pack_onednn),
    ]
    return [method for method in found if works(method)]


def works(method: Method) -> bool:
    try:
        with method.scope():
            method.call(torch.ones(2, 32, dtype=method.dtype), method.pack(torch.ones(16, 32, dtype=method.dtype)))
    except (RuntimeError, AttributeError) as error:
        print(f"{method.name}: left out, {str(error).splitlines()[0]}")
        return False
    return True


def seconds(method: Method, rows: int, shape: tuple[int, int], budget: float) -> float:
    """Median over at least 5 calls and about `budget` seconds."""
    size = shape[0] * shape[1] * method.dtype.itemsize
    copies = max(1, min(30, WEIGHT_BYTES // size))
    x = torch.randn(rows, shape[0]).to(method.dtype)
    with method.scope(), torch.inference_mode():
        plain = torch.randn(shape[1], shape[0]).to(method.dtype)
        weights = [method.pack(plain.clone()) for _ in range(copies)]
        for weight in weights[:2]:
            method.call(x, weight)
        times: list[float] = []
        end = time.perf_counter() + budget
        while len(times) < 5 or time.perf_counter() < end:
            weight = weights[len(times) % copies]
            begin = time.perf_counter()
            method.call(x, weight)
            times.append(time.perf_counter() - begin)
    return median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--budget", type=float, default=0.1, help="seconds per measurement")
    parser.add_argument("--rows", type=int, nargs="*", default=list(ROWS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    big = torch.ones(1 << 26)
    big.sum()
    reads = []
    for _ in range(9):
        begin = time.perf_counter()
        big.sum()
        reads.append(big.numel() * 4 / (time.perf_counter() - begin))
    del big
    print(f"{options.threads} threads, {torch.backends.cpu.get_cpu_capability()}, read {median(reads) / 1e9:.1f} GB/s")
    every = methods()
    total = {(method.name, rows): 0.0 for method in every for rows in options.rows}
    print(f"{'shape':14}{'rows':>5}  " + "".join(f"{method.name:>26}" for method in every))
    for shape, layers in MODEL.items():
        for rows in options.rows:
            cells = []
            for method in every:
                taken = seconds(method, rows, shape, options.budget)
                total[method.name, rows] += taken * layers
                operations, size = 2 * rows * shape[0] * shape[1], shape[0] * shape[1] * method.dtype.itemsize
                cells.append(f"{operations / taken / 1e9:11.1f} GF/s {size / taken / 1e9:5.1f} GB/s")
            print(f"{f'{shape[0]}→{shape[1]}':14}{rows:5}  " + "".join(f"{cell:>26}" for cell in cells), flush=True)
    print("\nThe whole model's linear layers, ms per step")
    print(f"{'rows':>5}  " + "".join(f"{method.name:>26}" for method in every))
    for rows in options.rows:
        print(f"{rows:5}  " + "".join(f"{total[method.name, rows] * 1e3:26.2f}" for method in every))


if __name__ == "__main__":
    main()

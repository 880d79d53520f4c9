"""The `linear` op in every form of weight beside torch's own matmuls, at decode and prefill sizes.

    python benchmarks/matmul_cpu.py

Every call takes the next of several weights, more of them than the caches hold, as a model's layers would. Times are
medians of single calls. GB/s counts the weight once, GFLOP/s two operations per multiply-add. The last table adds up a
whole model's linear layers per step. "oneDNN" weights are kept in its own blocked layout, as torch's compiled models do
on a CPU; "octavo" is the op, of weights that go by their number format (x is float32 unless stated).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from octavo.engine.quant.on_load import fp8, int4, int8
from octavo.kernels.matrix import Matrix
from octavo.kernels.ops import select

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


@dataclass(frozen=True)
class Method:
    """One way to multiply. `pack` turns a weight [out, in] into what `call(x [rows, in], packed)` takes.

    bytes_per_weight: as `call` reads it.
    """

    name: str
    dtype: torch.dtype
    bytes_per_weight: float
    call: Callable[[torch.Tensor, Any], torch.Tensor]
    pack: Callable[[torch.Tensor], Any]


def onednn(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def pack_onednn(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)


def q4_1(weight: torch.Tensor) -> Matrix:
    return int4(weight, 32)


def methods() -> list[Method]:
    float32, bfloat16 = torch.float32, torch.bfloat16
    ops = select(torch.device("cpu"), float32, force="cpu")

    def octavo(name: str, dtype: torch.dtype, size: float, matrix: Callable[[torch.Tensor], Matrix]) -> Method:
        return Method(f"octavo {name}", dtype, size, ops.linear, lambda weight: ops.pack_linear([matrix(weight)]))

    found = [
        Method("f32 MKL", float32, 4, F.linear, lambda weight: weight),
        Method("f32 oneDNN", float32, 4, onednn, pack_onednn),
        octavo("f32", float32, 4, Matrix),
        octavo("bf16, x f32", float32, 2, lambda weight: Matrix(weight.bfloat16())),
        Method("bf16 oneDNN", bfloat16, 2, onednn, pack_onednn),
        octavo("bf16, x bf16", bfloat16, 2, Matrix),
        octavo("fp8", float32, 1, fp8),
        octavo("int8", float32, 1, lambda weight: int8(weight).split_groups(64)),
        octavo("int4", float32, 0.625, q4_1),
    ]
    return [method for method in found if works(method)]


def works(method: Method) -> bool:
    try:
        method.call(torch.ones(2, 32, dtype=method.dtype), method.pack(torch.ones(16, 32, dtype=method.dtype)))
    except (RuntimeError, AttributeError) as error:
        print(f"{method.name}: left out, {str(error).splitlines()[0]}")
        return False
    return True


def seconds(method: Method, rows: int, shape: tuple[int, int], budget: float) -> float:
    """Median over at least 5 calls and about `budget` seconds."""
    size = shape[0] * shape[1] * method.bytes_per_weight
    copies = max(1, min(30, int(WEIGHT_BYTES / size)))
    x = torch.randn(rows, shape[0]).to(method.dtype)
    with torch.inference_mode():
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
                weights = shape[0] * shape[1]
                operations, size = 2 * rows * weights, weights * method.bytes_per_weight
                cells.append(f"{operations / taken / 1e9:11.1f} GF/s {size / taken / 1e9:5.1f} GB/s")
            print(f"{f'{shape[0]}→{shape[1]}':14}{rows:5}  " + "".join(f"{cell:>26}" for cell in cells), flush=True)
    print("\nThe whole model's linear layers, ms per step")
    print(f"{'rows':>5}  " + "".join(f"{method.name:>26}" for method in every))
    for rows in options.rows:
        print(f"{rows:5}  " + "".join(f"{total[method.name, rows] * 1e3:26.2f}" for method in every))


if __name__ == "__main__":
    main()

"""Matmuls of quantized weights on a GPU: python benchmarks/gpu_matmul.py [--interpret]

The shapes of Llama-3.1-8B's layers, for decoding (few rows) and for prefill (many). Every product is compared with the
product of the very numbers that it multiplies before it is timed. TFLOP/s are beside those of torch.matmul in bfloat16
on the same shape, GB/s of weights beside what a copy on the same device reads and writes. Times are medians of replays
of a CUDA graph over copies of the weight that do not fit into the L2 cache together.

--interpret: small shapes in Triton's interpreter, on a CPU, to see that all of it runs; its times mean nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

if "--interpret" in sys.argv:  # read when triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.nn.functional as F
from gpu_tiles import lines, try_tiles
from gpu_timing import seconds_of, sets_of
from report import save, show, table

from octavo.kernels.matrix import Matrix
from octavo.kernels.rounded import Rounding
from octavo.kernels.triton import tiles
from octavo.kernels.triton.grouped_matmul import grouped_linear
from octavo.kernels.triton.linear import linear, pack_linear
from octavo.kernels.triton.quantize_rows import quantize_rows

Shape = tuple[int, int]
LAYERS: dict[str, Shape] = {  # (outputs, inputs)
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate, up": (28672, 4096),
    "down": (4096, 14336),
}
ROWS = (1, 16, 64, 4096)
SMALL: dict[str, Shape] = {"small": (192, 256)}
SMALL_ROWS = (1, 20)
Routing = tuple[int, int]  # experts, and how many of them a row goes to
EXPERTS: Routing = (32, 4)
SMALL_EXPERTS: Routing = (4, 2)


def dtype_on(device: torch.device) -> torch.dtype:
    """The interpreter multiplies the bits of bfloat16, not the numbers."""
    return torch.bfloat16 if device.type == "cuda" else torch.float16


def float8(outputs: int, inputs: int, device: torch.device) -> torch.Tensor:
    return torch.randn(outputs, inputs, device=device).to(torch.float8_e4m3fn)


def codes(outputs: int, inputs: int, bits: int, device: torch.device) -> torch.Tensor:
    return torch.randint(0, 1 << bits, (outputs, inputs), dtype=torch.uint8, device=device)


def scales(outputs: int, groups: int, device: torch.device) -> torch.Tensor:
    return torch.rand(outputs, groups, device=device) * 0.01 + 0.001


def in_blocks(outputs: int, inputs: int, device: torch.device) -> Matrix:
    of_blocks = scales(-(-outputs // 128), inputs // 128, device).repeat_interleave(128, dim=0)[:outputs]
    return Matrix(float8(outputs, inputs, device), 8, 128, of_blocks)


def int8(outputs: int, inputs: int, device: torch.device) -> Matrix:
    return Matrix(codes(outputs, inputs, 8, device), 8, inputs, scales(outputs, 1, device), None, 128)


def awq(outputs: int, inputs: int, device: torch.device) -> Matrix:
    of_groups = scales(outputs, inputs // 128, device).half()
    return Matrix(codes(outputs, inputs, 4, device), 4, 128, of_groups, -7 * of_groups)


def gptq(outputs: int, inputs: int, device: torch.device) -> Matrix:
    return Matrix(codes(outputs, inputs, 4, device), 4, 128, scales(outputs, inputs // 128, device).half(), None, 8)


FORMS: dict[str, Callable[[int, int, torch.device], Matrix]] = {
    "fp8 per output": lambda n, k, device: Matrix(float8(n, k, device), 8, k, scales(n, 1, device)),
    "fp8 128×128": in_blocks,
    "int8 per output": int8,
    "AWQ 128": awq,
    "GPTQ 128": gptq,
}


@dataclass(frozen=True, slots=True)
class Measured:
    """One line of the table. seconds: of a product, the rounding of x included. weight_bytes: read by it."""

    what: str
    layer: str
    rows: int
    seconds: float
    flops: float
    weight_bytes: int
    plain_seconds: float  # torch.matmul in bfloat16

    @property
    def tflops(self) -> float:
        return self.flops / self.seconds / 1e12

    @property
    def gbytes(self) -> float:
        return self.weight_bytes / self.seconds / 1e9


def check(x: torch.Tensor, matrix: Matrix) -> None:
    """Raises AssertionError unless `linear` is the product of the numbers that it multiplies, to the last bit."""
    numbers = x.float()
    if matrix.bits == 8:
        kind = torch.float8_e4m3fn if matrix.values.dtype == torch.float8_e4m3fn else torch.int8
        numbers = quantize_rows(x, Rounding(kind, matrix.group_size)).numbers()
    expected = numbers.double() @ matrix.dequantize().double().T
    error = (linear(x, pack_linear([matrix])).double() - expected).abs().amax(dim=1)
    assert (error <= 2**-7 * expected.abs().amax(dim=1)).all(), f"error {error.max():.3g}"


def check_experts(x: torch.Tensor, weights: torch.Tensor, offsets: torch.Tensor) -> None:
    from octavo.kernels.ref import experts

    actual, expected = grouped_linear(x, weights, offsets), experts.grouped_linear(x, weights, offsets)
    assert ((actual - expected).abs().amax(dim=1) <= 2**-7 * expected.abs().amax(dim=1)).all()


def measure_layer(layer: str, shape: Shape, rows: int, device: torch.device, repeats: int) -> list[Measured]:
    outputs, inputs = shape
    x = torch.randn(rows, inputs, device=device).to(dtype_on(device))
    flops = 2.0 * rows * outputs * inputs
    plain = [torch.randn(outputs, inputs, device=device).to(x.dtype) for _ in range(sets_of(2 * outputs * inputs))]
    plain_seconds = seconds_of([lambda weight=weight: F.linear(x, weight) for weight in plain], repeats)
    nbytes = plain[0].nbytes
    del plain
    found = [Measured("bf16, torch", layer, rows, plain_seconds, flops, nbytes, plain_seconds)]
    for name, make in FORMS.items():
        matrix = make(outputs, inputs, device)
        check(x, matrix)
        weights = [pack_linear([matrix]) for _ in range(sets_of(matrix.nbytes))]
        seconds = seconds_of([lambda weight=weight: linear(x, weight) for weight in weights], repeats)
        found.append(Measured(name, layer, rows, seconds, flops, weights[0].nbytes, plain_seconds))
    return found


def measure_experts(
    shape: Shape, rows: int, device: torch.device, repeats: int, routing: Routing = EXPERTS
) -> list[Measured]:
    """Every row goes to some of the experts, drawn at random; beside one plain product of as many rows."""
    (outputs, inputs), (experts, each) = shape, routing
    chosen = torch.rand(rows, experts, device=device).topk(each).indices.flatten()
    counts = torch.bincount(chosen, minlength=experts)
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0))).to(torch.int32)
    x = torch.randn(rows * each, inputs, device=device).to(dtype_on(device))
    weights = torch.randn(experts, outputs, inputs, device=device).to(x.dtype)
    check_experts(x, weights, offsets)
    plain = seconds_of([lambda: F.linear(x, weights[0])], repeats)
    seconds = seconds_of([lambda: grouped_linear(x, weights, offsets)], repeats)
    nbytes = int((counts > 0).sum()) * weights[0].nbytes
    flops = 2.0 * len(x) * outputs * inputs
    return [Measured(f"{experts} experts, bf16", f"{outputs} × {inputs}", rows, seconds, flops, nbytes, plain)]


def tune(layers: dict[str, Shape], device: torch.device, repeats: int) -> None:
    """Prints the tiles that are fastest over all layers together, for each size in the table. The grouped product's are
    tried with as many rows for each of 8 experts."""
    capability, name = tiles.capability(device), device_name(device)
    for kernel, form in (("scaled", "fp8 128×128"), ("codes", "AWQ 128"), ("grouped", None)):
        weights = {shape: weights_of(form, shape, device) for shape in layers.values()}
        for most, rows in (16, 16), (32, 32), (64, 64), (tiles.ALL, 4096):
            calls = [call for shape in layers.values() for call in calls_of(weights[shape], shape, rows, device)]
            sizes = product((min(rows, 128),), (64, 128), (4, 8), (3, 4, 5), (1,) if kernel == "grouped" else (1, 2, 4))
            candidates = [tiles.MatmulTile(*size) for size in sizes]
            found = try_tiles(kernel, candidates, lambda calls=calls: seconds_of(calls, repeats))
            print(lines(kernel, capability, most, found, f"{form or 'experts'}, {rows} rows, {name}"), flush=True)


def weights_of(form: str | None, shape: Shape, device: torch.device) -> Any:
    """Packed; form None: of 8 experts in the activations' type."""
    if form is None:
        return torch.randn(8, *shape, device=device, dtype=dtype_on(device))
    return pack_linear([FORMS[form](*shape, device)])


def calls_of(weight: Any, shape: Shape, rows: int, device: torch.device) -> list[Callable[[], object]]:
    experts = len(weight) if isinstance(weight, torch.Tensor) else 1
    x = torch.randn(rows * experts, shape[1], device=device).to(dtype_on(device))
    if experts == 1:
        return [lambda: linear(x, weight)]
    offsets = torch.arange(0, len(x) + 1, rows, dtype=torch.int32, device=device)
    return [lambda: grouped_linear(x, weight, offsets)]


def copy_rate(device: torch.device, repeats: int) -> float:
    """Bytes per second that a copy on the device reads and writes together."""
    source = torch.empty(1 << (30 if device.type == "cuda" else 20), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds_of([lambda: target.copy_(source)], repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interpret", action="store_true", help="small shapes in Triton's interpreter")
    parser.add_argument("--rows", type=int, nargs="*", help=f"instead of {', '.join(map(str, ROWS))}")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument(
        "--tune", action="store_true", help="print better tiles as lines of octavo.kernels.triton.tiles"
    )
    parser.add_argument("--json", type=Path, help="where the results go")
    options = parser.parse_args()
    if not options.interpret and not torch.cuda.is_available():
        raise SystemExit("error: there is no CUDA GPU here; --interpret shows that the benchmark runs.")
    device = torch.device("cpu" if options.interpret else "cuda")
    torch.manual_seed(0)
    layers, all_rows = (SMALL, SMALL_ROWS) if options.interpret else (LAYERS, ROWS)
    found: list[Measured] = []
    if options.tune:
        with torch.inference_mode():
            tune(layers, device, options.repeats)
        return
    with torch.inference_mode():
        copied = copy_rate(device, options.repeats)
        for rows in options.rows or all_rows:
            for layer, shape in layers.items():
                found += measure_layer(layer, shape, rows, device, options.repeats)
            experts, routing = ((64, 128), SMALL_EXPERTS) if options.interpret else ((1536, 2048), EXPERTS)
            found += measure_experts(experts, rows, device, options.repeats, routing)
    shown = table(("weights", "layer", "rows", "µs", "TFLOP/s", "× bf16", "GB/s of weights", "of copy"), left=2)
    for one in found:
        shown.add_row(
            one.what,
            one.layer,
            str(one.rows),
            f"{one.seconds * 1e6:.1f}",
            f"{one.tflops:.1f}",
            f"{one.plain_seconds / one.seconds:.2f}",
            f"{one.gbytes:.0f}",
            f"{one.gbytes * 1e9 / copied:.0%}",
        )
    show(f"Matmuls, all checked; a copy moves {copied / 1e9:.0f} GB/s", shown)
    measured = ("what", "layer", "rows", "seconds", "tflops", "gbytes", "plain_seconds")
    results = [{name: getattr(one, name) for name in measured} for one in found]
    save("gpu_matmul", {"copy_gbytes": copied / 1e9, "device": device_name(device)}, results, options.json)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter"


if __name__ == "__main__":
    main()

"""Compile the Triton kernels for a GPU that is not here: python benchmarks/gpu_compile.py --capability 90

What Triton's interpreter cannot say: that the kernels compile, and what registers, spilled bytes and shared memory the
device's own assembler gives them, at the shapes of Llama 3.1 8B. Nothing is run. Ends with 1 where a kernel needs more
shared memory than a program may have, or cannot be compiled.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from octavo.kernels import triton as ops
from octavo.kernels.matrix import Matrix
from octavo.kernels.ops import AttentionBatch
from octavo.kernels.rounded import Rounding
from octavo.kernels.sampling import Draws, Masks, Penalised, Tallies
from octavo.kernels.triton import attention, splits, tiles
from octavo.kernels.triton.grouped_matmul import grouped_linear

HEADS, KV_HEADS, WIDTH, FFN, BLOCK_SIZE, PROCESSORS = 32, 8, 4096, 14336, 16, 132
SHARED = {
    80: 166912,
    86: 101376,
    89: 101376,
    90: 232448,
    100: 232448,
    120: 101376,
}  # bytes that a program may have, by capability
BF16, F16, F32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn


class AbsentDevice:
    """What Triton asks its driver for, up to the launch."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Compiled:
    kernel: str
    case: str
    registers: int
    spilled: int  # bytes of a thread's stack
    shared: int  # bytes of a program

    def __str__(self) -> str:
        return f"{self.kernel:18}{self.case:34}{self.registers:10}{self.spilled:9}{self.shared:9}"


def attend(dtype: torch.dtype, kv_dtype: torch.dtype, head_size: int, **options: Any) -> Callable[[], object]:
    """A step of decode rows and a chunk."""
    rows, tokens, blocks = 17, 16 + 64, 8192 // BLOCK_SIZE
    batch = AttentionBatch(
        block_tables=torch.zeros(rows, blocks, dtype=torch.int32),
        query_start=torch.zeros(rows + 1, dtype=torch.int32),
        context_lens=torch.zeros(rows, dtype=torch.int32),
        slot_mapping=torch.zeros(tokens, dtype=torch.int64),
        max_query_len=64,
        max_context_len=8192,
    )
    row_size = head_size + (4 if kv_dtype.itemsize == 1 else 0)
    caches = torch.zeros(2, 2, KV_HEADS, BLOCK_SIZE, row_size, dtype=kv_dtype)
    query = torch.zeros(tokens, HEADS, head_size, dtype=dtype)
    return lambda: ops.paged_attention(query, caches[0], caches[1], batch, 0.1, **options)


def write(kv_dtype: torch.dtype) -> Callable[[], object]:
    new = torch.zeros(2, 5, KV_HEADS, 128, dtype=BF16)
    row_size = 132 if kv_dtype.itemsize == 1 else 128
    caches = torch.zeros(2, 2, KV_HEADS, BLOCK_SIZE, row_size, dtype=kv_dtype)
    return lambda: ops.write_kv(new[0], new[1], caches[0], caches[1], torch.zeros(5, dtype=torch.int64))


def matmuls(capability: int) -> dict[str, Callable[[], object]]:
    """A tile of every size with every form of weights."""
    codes = torch.zeros(WIDTH, WIDTH, dtype=torch.uint8)
    scales = torch.ones(WIDTH, WIDTH // 128)
    forms = {
        "int8": Matrix(codes, 8, WIDTH, scales[:, :1], None, 128),
        "int8 in groups": Matrix(codes, 8, 128, scales, None, 128),
        "AWQ": Matrix(codes, 4, 128, scales.half(), scales.half()),
        "GPTQ": Matrix(codes, 4, 128, scales.half(), None, 8),
        "8-bit codes": Matrix(codes, 8, 128, scales.half(), scales.half()),
    }
    if capability >= 89:
        float8 = codes.view(FP8)
        forms |= {"float8": Matrix(float8, 8, WIDTH, scales[:, :1]), "float8 128×128": Matrix(float8, 8, 128, scales)}
    found: dict[str, Callable[[], object]] = {}
    for name, matrix in forms.items():
        packed = ops.pack_linear([matrix])
        for count in (1, 32, 64, 512):
            x = torch.zeros(count, WIDTH, dtype=BF16)
            found[f"{name}, {count} rows"] = lambda x=x, packed=packed: ops.linear(x, packed)
    weights, offsets = torch.zeros(8, 768, 2048, dtype=BF16), torch.zeros(9, dtype=torch.int32)
    for count in (8, 200, 500, 9000):
        x = torch.zeros(count, 2048, dtype=BF16)
        found[f"8 experts, {count} rows"] = lambda x=x: grouped_linear(x, weights, offsets)
    return found


def sampling() -> dict[str, Callable[[], object]]:
    logits, ids, ones = torch.zeros(2, 128256), torch.zeros(2, dtype=torch.int64), np.ones(2)
    draws = Draws(np.arange(2), ones, np.full(2, 50), ones * 0.9, ones * 0.1, ones * 0.5)
    masks = Masks(np.arange(2), torch.zeros(2, 4008, dtype=torch.int32))
    counts, seen, factor = logits.int(), torch.zeros(2, 512, dtype=torch.int64), np.ones(2, np.float32)
    tallies = Tallies(counts, counts.bool(), seen, ids)
    penalised = Penalised(np.arange(2), np.arange(2), factor, factor, factor, 512)
    return {
        "draws": lambda: ops.draw(logits, ops.find_peaks(logits), draws),
        "log probabilities": lambda: ops.take_logprobs(logits, ids, 20),
        "masks": lambda: ops.mask_logits(logits, masks),
        "penalties": lambda: ops.apply_penalties(logits, tallies, penalised),
        "counts": lambda: ops.count_tokens(tallies, np.arange(2), np.arange(2), ids),
    }


def cases(capability: int) -> dict[str, Callable[[], object]]:
    x, weight = torch.zeros(5, WIDTH, dtype=BF16), torch.zeros(WIDTH, dtype=BF16)
    heads, gates = torch.zeros(5, HEADS, 128, dtype=BF16), torch.zeros(5, 2 * FFN, dtype=BF16)
    rows = AttentionBatch(x, torch.zeros(3, dtype=torch.int32), x, x, 5, 5)
    positions, cos_sin = torch.zeros(5, dtype=torch.int64), torch.zeros(16, 128)
    caches = torch.zeros(2, 4, KV_HEADS, BLOCK_SIZE, 128, dtype=BF16)
    found: dict[str, Callable[[], object]] = {
        "a model's width": lambda: ops.rms_norm(x, weight, 1e-5),
        "heads": lambda: ops.rms_norm(heads, weight[:128], 1e-5),
        "the same, added": lambda: ops.add_rms_norm(x, x, weight, 1e-5),
        "rotary": lambda: ops.rotary(heads, heads, positions, cos_sin),
        "silu": lambda: ops.silu_and_mul(gates),
        "gelu": lambda: ops.gelu_tanh_and_mul(gates),
        "added, rounded to int8": lambda: ops.add_rms_norm(x, x, weight, 1e-5, Rounding(torch.int8, WIDTH)),
        "silu, rounded to int8": lambda: ops.silu_and_mul(gates, Rounding(torch.int8, FFN)),
        "copies": lambda: ops.copy_blocks(caches[0], caches[1], torch.zeros(2, 2, dtype=torch.int64)),
        "write bfloat16": write(BF16),
        "write int8": write(torch.int8),
        "an encoder's, head 64": lambda: ops.row_attention(*torch.zeros(3, 5, 12, 64, dtype=BF16), rows, 0.1),
        "an encoder's, head 128": lambda: ops.row_attention(*torch.zeros(3, 5, 12, 128, dtype=BF16), rows, 0.1),
        "an encoder's, float32": lambda: ops.row_attention(*torch.zeros(3, 5, 12, 128), rows, 0.1),
        "an encoder's, head 256": lambda: ops.row_attention(*torch.zeros(3, 5, 12, 256, dtype=BF16), rows, 0.1),
        "bfloat16, window, cap": attend(BF16, BF16, 128, window=1000, soft_cap=50.0),
        "float16, head 80": attend(F16, F16, 80),
    }
    for head_size in (64, 128, 256):
        found[f"bfloat16, head {head_size}"] = attend(BF16, BF16, head_size)
        found[f"float32, head {head_size}"] = attend(F32, F32, head_size)
        found[f"bfloat16 over int8, head {head_size}"] = attend(BF16, torch.int8, head_size)
    if capability >= 89:  # the first with numbers of e4m3
        found["write float8_e4m3fn"] = write(FP8)
        found["a width in blocks of float8"] = lambda: ops.add_rms_norm(x, x, weight, 1e-5, Rounding(FP8, 128))
        found["silu in blocks of float8"] = lambda: ops.silu_and_mul(gates, Rounding(FP8, 128))
        found["bfloat16 over float8_e4m3fn"] = attend(BF16, FP8, 128)
    return found | matmuls(capability) | sampling()


def compile_all(capability: int, only: str) -> list[Compiled]:
    """Every kernel that the cases launch, once."""
    compiled: dict[str, Compiled] = {}
    case = ""
    run = JITFunction.run

    def compile_only(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        binary = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        if binary.hash not in compiled:
            registers, spilled = resources(binary.asm["cubin"])
            compiled[binary.hash] = Compiled(kernel.__name__, case, registers, spilled, binary.metadata.shared)
            print(compiled[binary.hash], flush=True)
        return binary

    driver.set_active(AbsentDevice(capability))
    JITFunction.run = compile_only
    attention.processors = splits.processors = lambda device: PROCESSORS
    tiles.shared_memory, tiles.capability = lambda device: SHARED[capability], lambda device: capability
    print(f"{'kernel':18}{'case':34}{'registers':>10}{'spilled':>9}{'shared':>9}")
    for case, call in cases(capability).items():
        if only in case:
            call()
    return list(compiled.values())


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) of a thread."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=90, choices=sorted(SHARED))
    parser.add_argument("--only", default="", help="substring of the case")
    options = parser.parse_args()
    if triton.knobs.runtime.interpret:
        raise SystemExit("TRITON_INTERPRET is set: nothing would be compiled.")
    compiled = compile_all(options.capability, options.only)
    too_large = [one for one in compiled if one.shared > SHARED[options.capability]]
    print(f"{len(compiled)} kernels for capability {options.capability}; {len(too_large)} do not fit.")
    raise SystemExit(1 if too_large else 0)


if __name__ == "__main__":
    main()

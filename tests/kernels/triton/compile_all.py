"""Compiles the Triton bodies for an H100, on a machine without one: a line per kernel, and what the compiler says.

Launches become compilations for a device that is not there. What the interpreter lets pass and a compiler does not, of
which there is much (variables that change their type in a loop, shapes of a dot), is found so; what a kernel computes
is not.
"""

import os

os.environ["TRITON_INTERPRET"] = "0"

from typing import Any

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from octavo.kernels import triton
from octavo.kernels.matrix import Matrix
from octavo.kernels.ops import AttentionBatch
from octavo.kernels.sampling import Draws, Masks
from octavo.kernels.triton.grouped_matmul import grouped_linear


class H100:
    """What triton asks of a driver before it launches."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


_run = JITFunction.run


def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    compiled = _run(kernel, *args, grid=grid, warmup=True, **options)
    print("compiled", kernel.__name__, "shared memory", compiled.metadata.shared, flush=True)


def sampling() -> None:
    logits, ones = torch.zeros(2, 1000), np.ones(2)
    triton.draw(logits, triton.find_peaks(logits), Draws(np.arange(2), ones, np.full(2, 50), ones * 0.9, ones, ones))
    triton.take_logprobs(logits, torch.zeros(2, dtype=torch.int64), 5)
    triton.mask_logits(logits, Masks(np.arange(2), torch.zeros(2, 32, dtype=torch.int32)))


def matmuls() -> None:
    outputs, inputs = 256, 1024
    codes = torch.zeros(outputs, inputs, dtype=torch.uint8)
    float8, scales = codes.view(torch.float8_e4m3fn), torch.ones(outputs, inputs // 128)
    forms = [
        (Matrix(float8, 8, inputs, scales[:, :1]), 1),
        (Matrix(float8, 8, 128, scales), 256),
        (Matrix(codes, 8, inputs, scales[:, :1], None, 128), 64),
        (Matrix(codes, 4, 128, scales, scales), 1),
    ]
    for matrix, rows in forms:
        triton.linear(torch.zeros(rows, inputs, dtype=torch.bfloat16), triton.pack_linear([matrix]))
    x, weights = torch.zeros(40, 64, dtype=torch.bfloat16), torch.zeros(4, 128, 64, dtype=torch.bfloat16)
    grouped_linear(x, weights, torch.zeros(5, dtype=torch.int32))


def layers() -> None:
    x, weight = torch.zeros(8, 512, dtype=torch.bfloat16), torch.ones(512)
    triton.rms_norm(x, weight, 1e-6)
    triton.add_rms_norm(x, x.clone(), weight, 1e-6)
    triton.silu_and_mul(x)
    triton.rotary(
        x.view(8, 4, 128), x[:, :256].view(8, 2, 128), torch.zeros(8, dtype=torch.int64), torch.zeros(64, 128)
    )


def attention() -> None:
    """A sequence of one token beside one of many, contexts long enough to be split; caches in 8 bits."""
    batch = AttentionBatch(
        block_tables=torch.zeros(2, 32, dtype=torch.int32),
        query_start=torch.tensor([0, 1, 31], dtype=torch.int32),
        context_lens=torch.tensor([500, 500], dtype=torch.int32),
        slot_mapping=torch.zeros(31, dtype=torch.int64),
        max_query_len=30,
        max_context_len=500,
    )
    query, key = (torch.zeros(31, heads, 128, dtype=torch.bfloat16) for heads in (8, 2))
    keys, values = torch.zeros(2, 16, 2, 16, 132, dtype=torch.int8)
    triton.write_kv(key, key, keys, values, batch.slot_mapping)
    triton.paged_attention(query, keys, values, batch, 0.1)
    triton.copy_blocks(keys, values, torch.tensor([[0, 1]]))
    triton.row_attention(query, key, key, batch, 0.1)


if __name__ == "__main__":
    driver.set_active(H100())
    JITFunction.run = compile_only
    sampling()
    matmuls()
    layers()
    attention()

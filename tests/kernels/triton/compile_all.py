"""Compiles the Triton bodies for an H100, on a machine without one: a line per kernel, and what the compiler says. What
multiplies or rounds to 8 bits also for the first GPUs that have float8 (capability 8.9).

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
from octavo.kernels.rounded import Rounding
from octavo.kernels.sampling import Draws, Masks, Penalised, Tallies
from octavo.kernels.triton.allreduce import PROGRAMS, Peers, one_shot, sum_add_rms_norm, two_shot
from octavo.kernels.triton.grouped_matmul import grouped_linear


class AbsentGPU:
    """What triton asks of a driver before it launches. Every capability is a device: kernels are kept by device."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

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
    counts, seen = torch.zeros(2, 1000, dtype=torch.int32), torch.zeros(2, 256, dtype=torch.int64)
    tallies, factor = Tallies(counts, counts.bool(), seen, seen[:, 0]), np.ones(2, np.float32)
    triton.apply_penalties(logits, tallies, Penalised(np.arange(2), np.arange(2), factor, factor, factor, 256))
    triton.count_tokens(tallies, np.arange(2), np.arange(2), seen[:, 0])


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
    for rounding in (None, Rounding(torch.float8_e4m3fn, 128), Rounding(torch.int8, 512)):
        triton.rms_norm(x, weight, 1e-6, rounding)
        triton.add_rms_norm(x, x.clone(), weight, 1e-6, rounding)
        triton.silu_and_mul(torch.cat((x, x), dim=1), rounding)
    triton.rotary(
        x.view(8, 4, 128), x[:, :256].view(8, 2, 128), torch.zeros(8, dtype=torch.int64), torch.zeros(64, 128)
    )


def attention(kv_dtype: torch.dtype = torch.int8) -> None:
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
    keys, values = torch.zeros(2, 16, 2, 16, 132, dtype=torch.int8).view(kv_dtype)
    triton.write_kv(key, key, keys, values, batch.slot_mapping)
    triton.paged_attention(query, keys, values, batch, 0.1)
    triton.copy_blocks(keys, values, torch.tensor([[0, 1]]))
    triton.row_attention(query, key, key, batch, 0.1)


def sums_over_ranks(*roundings: Rounding) -> None:
    peers = Peers(1, 8, torch.zeros(8, dtype=torch.int64), torch.zeros(PROGRAMS, dtype=torch.int32), 128 << 10)
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.zeros(8, 4096, dtype=dtype)
        one_shot(x, peers)
        two_shot(x, peers)
        for rounding in (None, *roundings):
            sum_add_rms_norm(x, x.clone(), torch.ones(4096), 1e-6, peers, rounding)


if __name__ == "__main__":
    JITFunction.run = compile_only
    driver.set_active(AbsentGPU(90))
    sampling()
    matmuls()
    layers()
    attention()
    sums_over_ranks(Rounding(torch.float8_e4m3fn, 128), Rounding(torch.int8, 4096))
    driver.set_active(AbsentGPU(80))
    sums_over_ranks()
    driver.set_active(AbsentGPU(89))
    attention(torch.float8_e4m3fn)
    matmuls()
    layers()

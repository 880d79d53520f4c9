"""The tiles of the kernels that leave a choice, as data: by kernel, by compute capability, by size.

A device takes the entries of the highest capability that is not above its own. What benchmarks/gpu_attention.py --tune
and benchmarks/gpu_matmul.py --tune print are lines of these tables, for the device they ran on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """block_m: rows (queries × heads of a group) of a program; block_n: KV positions of a step. ahead: steps whose KV
    is on its way while one is computed. programs: per processor, that the split of decode rows aims at."""

    block_m: int
    block_n: int
    warps: int
    ahead: int
    programs: int = 0

    @property
    def stages(self) -> int:
        """Of Triton's software pipeline: KV hangs on the block table, so that a step ahead is two loads ahead."""
        return 2 * self.ahead + 1


@dataclass(frozen=True, slots=True)
class MatmulTile:
    """What a program computes, and how. rows, outputs: powers of two, at least 16.

    programs: that a processor runs at once, into as many of which products of few outputs are cut.
    """

    rows: int
    outputs: int
    warps: int
    stages: int
    programs: int = 1

    def stages_of(self, step_bytes: int, device: torch.device) -> int:
        """As many as fit, of so many bytes each, with as much again for other uses as the last one takes."""
        return max(1, min(self.stages, shared_memory(device) // step_bytes - 1))


# (the largest size that the tile is for, tile), ascending; the last is for all that is larger too.
AttentionEntries = tuple[tuple[int, AttentionTile], ...]
MatmulEntries = tuple[tuple[int, MatmulTile], ...]
ALL = 1 << 40

# Kernel and bytes of a query's element → capability → by head size, padded to a power of two.
# All of them by what the compiler says of registers and shared memory: not measured.
# 8.6, 8.9 and 12.0 give a program some 100 KB of shared memory.
ATTENTION: dict[str, dict[int, AttentionEntries]] = {
    "decode 2": {
        80: (
            (64, AttentionTile(16, 128, 4, 2, 4)),
            (128, AttentionTile(16, 64, 4, 2, 4)),
            (256, AttentionTile(16, 32, 4, 2, 4)),
        ),
    },
    "decode 4": {
        80: (
            (64, AttentionTile(16, 64, 4, 1, 4)),
            (128, AttentionTile(16, 32, 4, 1, 4)),
            (256, AttentionTile(16, 16, 4, 1, 4)),
        ),
    },
    "prefill 2": {
        80: (
            (64, AttentionTile(128, 64, 4, 2)),
            (128, AttentionTile(128, 64, 8, 2)),
            (256, AttentionTile(64, 32, 4, 1)),
        ),
        86: (
            (64, AttentionTile(128, 64, 4, 1)),
            (128, AttentionTile(128, 64, 8, 1)),
            (256, AttentionTile(64, 32, 4, 1)),
        ),
        90: (
            (64, AttentionTile(128, 64, 4, 2)),
            (128, AttentionTile(128, 64, 8, 2)),
            (256, AttentionTile(64, 32, 4, 1)),
        ),
        120: (
            (64, AttentionTile(128, 64, 4, 1)),
            (128, AttentionTile(128, 64, 8, 1)),
            (256, AttentionTile(64, 32, 4, 1)),
        ),
    },
    "prefill 4": {
        80: (
            (64, AttentionTile(64, 32, 4, 1)),
            (128, AttentionTile(64, 32, 8, 1)),
            (256, AttentionTile(32, 16, 8, 1)),
        ),
        86: (
            (64, AttentionTile(64, 32, 4, 1)),
            (128, AttentionTile(32, 32, 4, 1)),
            (256, AttentionTile(16, 16, 4, 1)),
        ),
        90: (
            (64, AttentionTile(64, 32, 4, 1)),
            (128, AttentionTile(64, 32, 8, 1)),
            (256, AttentionTile(32, 16, 8, 1)),
        ),
        120: (
            (64, AttentionTile(64, 32, 4, 1)),
            (128, AttentionTile(32, 32, 4, 1)),
            (256, AttentionTile(16, 16, 4, 1)),
        ),
    },
}

# Kernel → capability → by rows; of the grouped product by rows per expert, on average.
# All of them by what the compiler says of registers and shared memory: not measured.
MATMUL: dict[str, dict[int, MatmulEntries]] = {
    "scaled": {
        80: (
            (16, MatmulTile(16, 64, 4, 5, programs=4)),
            (32, MatmulTile(32, 64, 4, 4, programs=4)),
            (64, MatmulTile(64, 128, 4, 4, programs=2)),
            (ALL, MatmulTile(128, 128, 8, 3)),
        ),
    },
    "codes": {
        80: (
            (16, MatmulTile(16, 64, 4, 5, programs=4)),
            (32, MatmulTile(32, 64, 4, 4, programs=4)),
            (64, MatmulTile(64, 128, 8, 3, programs=2)),
            (ALL, MatmulTile(128, 128, 8, 3)),
        ),
    },
    "grouped": {
        80: (
            (16, MatmulTile(16, 128, 4, 4)),
            (32, MatmulTile(32, 128, 4, 4)),
            (64, MatmulTile(64, 128, 4, 4)),
            (ALL, MatmulTile(128, 128, 8, 3)),
        ),
    },
}


def attention_tile(kernel: str, head: int, device: torch.device) -> AttentionTile:
    """kernel: a name in ATTENTION. head: its padded size."""
    entries = _entries(ATTENTION[kernel], device)
    return next((tile for most, tile in entries if head <= most), entries[-1][1])


def matmul_tile(kernel: str, rows: int, device: torch.device) -> MatmulTile:
    """kernel: a name in MATMUL."""
    entries = _entries(MATMUL[kernel], device)
    return next((tile for most, tile in entries if rows <= most), entries[-1][1])


def _entries(table: Mapping[int, T], device: torch.device) -> T:
    mine = capability(device)
    return table[max((one for one in table if one <= mine), default=min(table))]


@cache
def capability(device: torch.device) -> int:
    """As in sm_90. The interpreter's: an H100's."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 8  # of the interpreter: enough for a few parts
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have."""
    if device.type != "cuda":
        return 227 << 10
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)

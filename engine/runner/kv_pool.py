"""The KV pool of one rank: how many blocks there are, and the tensors that are them.

Planned from the `KVSpec`s that the layers declare; nobody computes KV bytes from a model's config.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from octavo.engine.config import EngineConfig
from octavo.engine.errors import ConfigError
from octavo.engine.layers.kv import KVSpec

CPU_DEFAULT_BYTES = 4 << 30


@dataclass(frozen=True, slots=True)
class KVPool:
    """caches: per attention layer (key, value), each as ops.WriteKV says. On CPU only written blocks use memory."""

    caches: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    block_size: int

    @classmethod
    def allocate(cls, specs: Sequence[KVSpec], num_blocks: int, block_size: int, device: torch.device) -> KVPool:
        def cache(spec: KVSpec) -> torch.Tensor:
            # Zeros, not empty: masked positions are multiplied by 0, and 0 * NaN would be NaN.
            shape = (num_blocks, spec.num_kv_heads, block_size, spec.row_size)
            dtype = getattr(torch, spec.dtype)
            return _lazy_zeros(shape, dtype) if device.type == "cpu" else torch.zeros(shape, dtype=dtype, device=device)

        return cls(tuple((cache(spec), cache(spec)) for spec in specs), block_size)


def plan_num_blocks(
    config: EngineConfig,
    specs: Sequence[KVSpec],
    max_model_len: int,
    device: torch.device,
    reserved_bytes: int = 0,
    sharers: int = 1,
) -> int:
    """How many blocks the pool gets. `reserved_bytes`: device memory that a step needs besides weights and KV.
    `sharers`: ranks of the replica that share the memory of this machine, where KV lies on the CPU.

    Never more than all sequences at full length could use. Raises ConfigError if not even one block fits.
    """
    if config.num_gpu_blocks_override is not None:
        return config.num_gpu_blocks_override
    most = config.max_num_seqs * -(-max_model_len // config.block_size)
    block_bytes = config.block_size * sum(spec.bytes_per_token for spec in specs)
    if block_bytes == 0:  # an encoder's, which keeps nothing
        return max(2, most)
    memory = config.kv_cache_memory_bytes
    if memory is None:
        memory = _gpu_bytes(config, device, reserved_bytes) if device.type == "cuda" else _cpu_bytes() // sharers
    blocks = min(memory // block_bytes, most)
    if blocks < 2:
        raise ConfigError(
            f"The KV cache gets {max(memory, 0) / 2**20:.0f} MiB, but two blocks of {config.block_size} tokens need "
            f"{2 * block_bytes / 2**20:.1f} MiB: set kv_cache_memory_bytes higher."
        )
    return blocks


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros that the operating system hands out when they are written, in huge pages where it has them.

    Blocks lie scattered in the pool: with pages of 4 KiB, nearly every one of them would miss in the TLB.
    """
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _cpu_bytes() -> int:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(CPU_DEFAULT_BYTES, free // 4)


def _gpu_bytes(config: EngineConfig, device: torch.device, reserved_bytes: int) -> int:
    free, total = torch.cuda.mem_get_info(device)
    return int(free - total * (1 - config.gpu_memory_utilization)) - reserved_bytes

"""The KV pool of one rank: how many blocks there are, and the tensors that are them.

Planned from the `KVSpec`s that the layers declare; nobody computes KV bytes from a model's config.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from octavo.engine.config import EngineConfig
from octavo.engine.errors import ConfigError
from octavo.engine.layers.kv import KVSpec


@dataclass(frozen=True, slots=True)
class KVPool:
    """caches: per attention layer (key, value), each as ops.WriteKV says. On CPU only written blocks use memory."""

    caches: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    block_size: int

    @classmethod
    def allocate(cls, specs: Sequence[KVSpec], num_blocks: int, block_size: int, device: torch.device) -> KVPool:
        """Raises ConfigError if a GPU has not as much left."""

        def cache(spec: KVSpec) -> torch.Tensor:
            # Zeros, not empty: masked positions are multiplied by 0, and 0 * NaN would be NaN.
            shape = (num_blocks, spec.num_kv_heads, block_size, spec.row_size)
            dtype = getattr(torch, spec.dtype)
            return _lazy_zeros(shape, dtype) if device.type == "cpu" else torch.zeros(shape, dtype=dtype, device=device)

        try:
            return cls(tuple((cache(spec), cache(spec)) for spec in specs), block_size)
        except torch.OutOfMemoryError:
            wanted = num_blocks * block_size * sum(spec.bytes_per_token for spec in specs)
            raise ConfigError(
                f"{num_blocks} KV blocks are {wanted / 2**30:.1f} GiB, and the GPU has not as much left: lower "
                f"gpu_memory_utilization, or whichever of kv_cache_memory_bytes and num_gpu_blocks_override is set."
            ) from None


def plan_num_blocks(
    config: EngineConfig, specs: Sequence[KVSpec], max_model_len: int, memory: Callable[[], int]
) -> int:
    """How many blocks the pool gets. memory: the bytes to be had, asked for where the config does not say.

    Never more than all sequences at full length could use. Raises ConfigError if not even two blocks fit.
    """
    if config.num_gpu_blocks_override is not None:
        return config.num_gpu_blocks_override
    most = config.max_num_seqs * -(-max_model_len // config.block_size)
    block_bytes = config.block_size * sum(spec.bytes_per_token for spec in specs)
    if block_bytes == 0:  # an encoder's, which keeps nothing
        return max(2, most)
    room = memory() if config.kv_cache_memory_bytes is None else config.kv_cache_memory_bytes
    blocks = min(room // block_bytes, most)
    if blocks < 2:
        raise ConfigError(
            f"The KV cache gets {max(room, 0) / 2**20:.0f} MiB, but two blocks of {config.block_size} tokens need "
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

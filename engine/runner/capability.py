"""What a GPU must be able to do for what is asked of it: refusals in one sentence, before weights load.

Functions of a GPU's compute capability and of what was asked for, so they are tested without a GPU; `gpu_of` alone asks
the driver. Sources: what Triton compiles for which target (float8 e4m3 from sm_89, dots of 8-bit integers from sm_80);
NVIDIA's table of compute capabilities.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from octavo.engine.errors import ConfigError

Capability = tuple[int, int]

LEAST: Capability = (8, 0)
BFLOAT16: Capability = (8, 0)
FLOAT8: Capability = (8, 9)


@dataclass(frozen=True, slots=True)
class Gpu:
    """name: as the driver calls it. capability: (major, minor)."""

    name: str
    capability: Capability

    def __str__(self) -> str:
        return f"{self.name} has {_text(self.capability)}"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked of a GPU. triton: ops have bodies in Triton; the other ones, in plain torch, compute everything by
    detours. dtype, kv_dtype: of activations and of KV. float8_weights: matrices that are multiplied with as float8."""

    triton: bool
    dtype: torch.dtype
    kv_dtype: torch.dtype
    float8_weights: bool


def check_triton(kernels: str | None, installed: bool) -> None:
    """On a GPU. kernels: EngineConfig's. Raises ConfigError where only the definitions of the ops were left to run."""
    if not installed and kernels in (None, "triton"):
        raise ConfigError(
            "octavo's kernels for GPUs are written in Triton, which is not installed here: pip install triton "
            "(kernels ref does without it, far too slowly to serve with)."
        )


def check_gpu(gpu: Gpu, wanted: Wanted) -> None:
    """Raises ConfigError that says what to change."""
    if wanted.triton and gpu.capability < LEAST:
        raise ConfigError(
            f"octavo's kernels for GPUs need compute capability {_text(LEAST)} (Ampere) or newer, and {gpu}: "
            f"use another GPU, or device cpu."
        )
    if wanted.dtype == torch.bfloat16 and gpu.capability < BFLOAT16:
        raise ConfigError(
            f"bfloat16 needs compute capability {_text(BFLOAT16)} or newer, and {gpu}: set dtype to float16."
        )
    if not wanted.triton or gpu.capability >= FLOAT8:
        return
    if wanted.float8_weights:
        raise ConfigError(
            f"float8 weights need compute capability {_text(FLOAT8)} (Ada, Hopper) or newer, and {gpu}: "
            f"set quantization to int8, which takes as much memory, or to none."
        )
    if wanted.kv_dtype == torch.float8_e4m3fn:
        raise ConfigError(
            f"kv_cache_dtype fp8 needs compute capability {_text(FLOAT8)} (Ada, Hopper) or newer, and {gpu}: "
            f"set it to int8, which takes as much memory."
        )


def gpu_of(device: torch.device) -> Gpu:
    """device: of CUDA."""
    return Gpu(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))


def _text(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"

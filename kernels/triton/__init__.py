"""Triton bodies of the ops, for CUDA devices. Contracts: `octavo.kernels.ops`.

Knows tensors, their strides and the device's number of processors. Launches wait for nothing and read nothing from the
device, and grids follow from shapes alone, so that every op can be captured in a CUDA graph.

With TRITON_INTERPRET=1 in the environment when triton is first imported, the same kernels run in Triton's interpreter,
on CPU tensors: slowly, for tests.
"""

import torch
from triton import knobs

from octavo.kernels.triton.activation import gelu_tanh, gelu_tanh_and_mul, silu_and_mul
from octavo.kernels.triton.attention import paged_attention
from octavo.kernels.triton.cache import copy_blocks, write_kv
from octavo.kernels.triton.draw import draw, draw_rows
from octavo.kernels.triton.graph import record
from octavo.kernels.triton.linear import embedding, linear, pack_linear, rounding_of
from octavo.kernels.triton.mask_logits import mask_logits
from octavo.kernels.triton.norm import add_rms_norm, rms_norm
from octavo.kernels.triton.peaks import find_peaks
from octavo.kernels.triton.penalties import apply_penalties, count_tokens
from octavo.kernels.triton.rotary import rotary
from octavo.kernels.triton.row_attention import row_attention
from octavo.kernels.triton.take_logprobs import take_logprobs

__all__ = [
    "add_rms_norm",
    "apply_penalties",
    "available",
    "copy_blocks",
    "count_tokens",
    "draw",
    "draw_rows",
    "embedding",
    "find_peaks",
    "gelu_tanh",
    "gelu_tanh_and_mul",
    "linear",
    "mask_logits",
    "pack_linear",
    "paged_attention",
    "record",
    "rms_norm",
    "rotary",
    "rounding_of",
    "row_attention",
    "silu_and_mul",
    "take_logprobs",
    "write_kv",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """On the CPU only where the interpreter runs."""
    return dtype in DTYPES and (device.type == "cuda" or bool(knobs.runtime.interpret))

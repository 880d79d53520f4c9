"""The definition of every op of `octavo.kernels.ops`, in plain torch. Runs on any device and dtype."""

import torch

from octavo.kernels.ref.activation import gelu_tanh, gelu_tanh_and_mul, silu_and_mul
from octavo.kernels.ref.attention import paged_attention, row_attention
from octavo.kernels.ref.cache import copy_blocks, write_kv
from octavo.kernels.ref.linear import embedding, linear, pack_linear, rounding_of
from octavo.kernels.ref.norm import add_rms_norm, rms_norm
from octavo.kernels.ref.penalties import apply_penalties, count_tokens
from octavo.kernels.ref.rotary import rotary
from octavo.kernels.ref.sampling import draw, find_peaks, mask_logits, take_logprobs

__all__ = [
    "add_rms_norm",
    "apply_penalties",
    "available",
    "copy_blocks",
    "count_tokens",
    "draw",
    "embedding",
    "find_peaks",
    "gelu_tanh",
    "gelu_tanh_and_mul",
    "linear",
    "mask_logits",
    "pack_linear",
    "paged_attention",
    "rms_norm",
    "rotary",
    "rounding_of",
    "row_attention",
    "silu_and_mul",
    "take_logprobs",
    "write_kv",
]


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Plain torch runs everywhere."""
    return True

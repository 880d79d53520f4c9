"""Turns the quantized blocks of GGUF tensors into matrices of codes and scales.

Knows the block layouts of ggml's tensor types, and nothing of files, names or models. A tensor of these types is a run
of blocks; each holds a fixed number of weights as small integers and the scales to multiply them with.
Source of the layouts: ggml's ggml-common.h and ggml-quants.c, github.com/ggml-org/ggml.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from octavo.kernels.matrix import Matrix

# Blocks are taken apart a megabyte at a time, so that a chunk's intermediates stay in a CPU's cache; a GPU wants more
# to do at once.
_CHUNK_WEIGHTS, _GPU_CHUNK_WEIGHTS = 1 << 18, 1 << 24


class Parts(NamedTuple):
    """n blocks taken apart. codes: [n, weights] uint8; scales, mins: [n, groups of the block], of one dtype."""

    codes: torch.Tensor
    scales: torch.Tensor
    mins: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class TensorType:
    """How ggml stores a tensor: blocks of `weights` numbers in `size` bytes each.

    decode: [n, size] uint8 → the blocks' parts, in codes of `bits` around `zero`. None: the numbers are stored as they
    are, in `dtype`.
    """

    name: str
    weights: int
    size: int
    dtype: torch.dtype = torch.float32
    decode: Callable[[torch.Tensor], Parts] | None = None
    bits: int = 8
    zero: int = 0

    def num_bytes(self, num_weights: int) -> int:
        """Bytes of a tensor. `num_weights` must be whole blocks."""
        return num_weights // self.weights * self.size


def matrix(data: torch.Tensor, kind: TensorType, shape: tuple[int, int]) -> Matrix:
    """data: [bytes] uint8 on any device, whole blocks of a quantized type; shape: [N, K], K whole blocks. Exact."""
    assert kind.decode is not None
    blocks = data.view(-1, kind.size)
    step = (_CHUNK_WEIGHTS if data.device.type == "cpu" else _GPU_CHUNK_WEIGHTS) // kind.weights
    codes = data.new_empty(len(blocks), kind.weights)
    scales, mins = [], []
    for start in range(0, len(blocks), step):
        parts = kind.decode(blocks[start : start + step])
        codes[start : start + step] = parts.codes
        scales.append(parts.scales)
        if parts.mins is not None:
            mins.append(parts.mins)
    return Matrix(
        codes.view(shape),
        kind.bits,
        kind.weights // scales[0].shape[1],
        torch.cat(scales).view(shape[0], -1),
        torch.cat(mins).view(shape[0], -1) if mins else None,
        kind.zero,
    )


def dequantize(data: torch.Tensor, kind: TensorType) -> torch.Tensor:
    """data: [bytes] uint8, whole blocks → [weights], float32 or, for a type that is not quantized, its own dtype.

    The result of an unquantized type shares `data`'s memory.
    """
    if kind.decode is None:
        return data.view(kind.dtype)
    weights = len(data) // kind.size * kind.weights
    return matrix(data, kind, (1, weights)).dequantize().view(-1)


def _half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """The float16 at byte `at` of each block: [n, 1]."""
    return blocks[:, at : at + 2].view(torch.float16)


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """packed: [..., b] uint8 → [..., 2, b] uint8: the low halves of the bytes, then the high halves."""
    out = packed.new_empty(*packed.shape[:-1], 2, packed.shape[-1])
    torch.bitwise_and(packed, 15, out=out[..., 0, :])
    torch.bitwise_right_shift(packed, 4, out=out[..., 1, :])
    return out


def _bits(packed: torch.Tensor) -> torch.Tensor:
    """packed: [n, 4] uint8 → [n, 32] uint8: bit i of the little-endian 32-bit number, in bit 4."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts & 1) << 4).view(-1, 32)


def _q8_0(blocks: torch.Tensor) -> Parts:
    """scale, 32 × int8: the same bits as codes around 128 but for the highest."""
    return Parts(blocks[:, 2:] ^ 128, _half(blocks, 0))


def _q4_0(blocks: torch.Tensor) -> Parts:
    """scale, 32 × 4 bits, stored + 8."""
    return Parts(_nibbles(blocks[:, 2:]).view(-1, 32), _half(blocks, 0))


def _q4_1(blocks: torch.Tensor) -> Parts:
    """scale, minimum, 32 × 4 bits."""
    return Parts(_nibbles(blocks[:, 4:]).view(-1, 32), _half(blocks, 0), _half(blocks, 2))


def _q5_0(blocks: torch.Tensor) -> Parts:
    """scale, 32 high bits, 32 × 4 low bits; stored + 16."""
    return Parts(_nibbles(blocks[:, 6:]).view(-1, 32) | _bits(blocks[:, 2:6]), _half(blocks, 0))


def _q5_1(blocks: torch.Tensor) -> Parts:
    """scale, minimum, 32 high bits, 32 × 4 low bits."""
    codes = _nibbles(blocks[:, 8:]).view(-1, 32) | _bits(blocks[:, 4:8])
    return Parts(codes, _half(blocks, 0), _half(blocks, 2))


def _sub_scales(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and (negative) minimum of the 8 sub-blocks of a Q4_K or Q5_K block: [n, 8] float32 each.

    12 bytes from byte 4 hold 8 + 8 numbers of 6 bits: the first four of each in the low 6 bits of bytes 0-3 and 4-7; of
    the other four, the low 4 bits in bytes 8-11 and the high 2 bits on top of bytes 0-7.
    """
    low, mid, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = torch.cat((low & 63, (rest & 15) | ((low >> 6) << 4)), dim=1)
    minimum = torch.cat((mid & 63, (rest >> 4) | ((mid >> 6) << 4)), dim=1)
    return scale.float() * _half(blocks, 0).float(), minimum.float() * -_half(blocks, 2).float()


def _q4_k(blocks: torch.Tensor) -> Parts:
    """scale of scales, scale of minima, 12 bytes of both, 256 × 4 bits: sub-blocks 2i and 2i + 1 share 32 bytes."""
    return Parts(_nibbles(blocks[:, 16:].unflatten(1, (4, 32))).view(-1, 256), *_sub_scales(blocks))


def _q5_k(blocks: torch.Tensor) -> Parts:
    """As Q4_K, and 32 bytes of high bits: bit i of byte j belongs to weight j of sub-block i."""
    low = _nibbles(blocks[:, 48:].unflatten(1, (4, 32))).view(-1, 8, 32)
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device).view(8, 1)
    codes = ((blocks[:, 16:48].unsqueeze(1) >> shifts & 1) << 4).bitwise_or_(low)
    return Parts(codes.view(-1, 256), *_sub_scales(blocks))


def _q6_k(blocks: torch.Tensor) -> Parts:
    """128 bytes of low halves, 64 of high pairs of bits, 16 int8 scales of 16 weights each, scale; stored + 32.

    Each half of the block: 64 bytes hold the low 4 bits of rows 0 and 1 (low halves) and 2 and 3 (high halves) of 32
    weights; 32 bytes hold the high 2 bits of the four rows.
    """
    codes = _nibbles(blocks[:, :128].unflatten(1, (2, 64))).view(-1, 2, 4, 32)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device).view(4, 1)
    codes |= (blocks[:, 128:192].unflatten(1, (2, 1, 32)) >> shifts & 3) << 4
    scales = blocks[:, 192:208].view(torch.int8).float() * _half(blocks, 208).float()
    return Parts(codes.view(-1, 256), scales)


# ggml's number of a type → how to read it
TYPES: dict[int, TensorType] = {
    0: TensorType("F32", 1, 4, torch.float32),
    1: TensorType("F16", 1, 2, torch.float16),
    2: TensorType("Q4_0", 32, 18, decode=_q4_0, bits=4, zero=8),
    3: TensorType("Q4_1", 32, 20, decode=_q4_1, bits=4),
    6: TensorType("Q5_0", 32, 22, decode=_q5_0, zero=16),
    7: TensorType("Q5_1", 32, 24, decode=_q5_1),
    8: TensorType("Q8_0", 32, 34, decode=_q8_0, zero=128),
    12: TensorType("Q4_K", 256, 144, decode=_q4_k, bits=4),
    13: TensorType("Q5_K", 256, 176, decode=_q5_k),
    14: TensorType("Q6_K", 256, 210, decode=_q6_k, zero=32),
    30: TensorType("BF16", 1, 2, torch.bfloat16),
}

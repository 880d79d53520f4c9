"""Quantized weights as the published layouts store them, written plainly from their descriptions, word by word.

Every packer takes a weight [N, K] and returns the module's tensors and the exact weight they stand for, in float64.
"""

from __future__ import annotations

import numpy as np
import torch

Packed = tuple[dict[str, torch.Tensor], np.ndarray]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def random_weight(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Some groups lie off zero, so that zero points differ and some are at the end of their range."""
    random = np.random.default_rng(seed)
    weight = random.normal(0, 1, (height, width)) * random.lognormal(0, 1, (height, 1))
    return (weight + random.choice([0, 0, 3, -3], (height, 1)) * random.random((height, width))).astype(np.float32)


def group_index(width: int, group_size: int) -> np.ndarray:
    """[K]: the group of each input in order; group_size -1 = one."""
    return np.arange(width) // (width if group_size == -1 else group_size)


def round_to_nearest(
    weight: np.ndarray, groups: np.ndarray, bits: int, symmetric: bool, dtype: torch.dtype = torch.float16
) -> tuple[np.ndarray, torch.Tensor, np.ndarray, np.ndarray]:
    """→ codes [N, K] from 0 up, scales [N, G] of dtype, zero points [N, G] from 0 up, and what they stand for."""
    count, top = groups.max() + 1, 2**bits - 1
    codes = np.empty(weight.shape, dtype=np.int64)
    scales = torch.empty(len(weight), count, dtype=dtype)
    zeros = np.empty((len(weight), count), dtype=np.int64)
    exact = np.empty(weight.shape)
    for g in range(count):
        columns = groups == g
        part = weight[:, columns]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        scale = np.abs(part).max(1) * 2 / top if symmetric else (high - low) / top
        scales[:, g] = torch.from_numpy(np.maximum(scale, 1e-6))
        step = scales[:, g].double().numpy()
        zeros[:, g] = 2 ** (bits - 1) if symmetric else np.clip(np.round(-low / step), 0, top)
        codes[:, columns] = np.clip(np.round(part / step[:, None]) + zeros[:, g : g + 1], 0, top)
        exact[:, columns] = (codes[:, columns] - zeros[:, g : g + 1]) * step[:, None]
    return codes, scales, zeros, exact


def words(codes: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """codes: [r, n] → [r, ⌈n × bits / 32⌉] int32. The i-th lowest bits of a word hold the order[i]-th of its codes."""
    per_word = 32 // bits
    packed = np.zeros((len(codes), -(-codes.shape[1] // per_word)), dtype=np.uint64)
    for column in range(packed.shape[1]):
        for i, place in enumerate(order or range(per_word)):
            if column * per_word + place < codes.shape[1]:
                packed[:, column] |= codes[:, column * per_word + place].astype(np.uint64) << np.uint64(bits * i)
    return torch.from_numpy(packed.astype(np.uint32).view(np.int32))


def gptq(
    weight: np.ndarray,
    bits: int = 4,
    group_size: int = 32,
    sym: bool = True,
    desc_act: bool = False,
    v2: bool = False,
) -> Packed:
    width = weight.shape[1]
    groups = group_index(width, group_size)
    if desc_act:
        groups = np.random.default_rng(width).permutation(groups)
    codes, scales, zeros, exact = round_to_nearest(weight, groups, bits, sym)
    qzeros = words(zeros.T, bits)
    if not v2:  # GPTQModel subtracts one from every zero point of a word at once
        qzeros = qzeros - sum(1 << at for at in range(0, 32, bits))
    pieces = {
        "qweight": words(codes, bits).t().contiguous(),
        "qzeros": qzeros,
        "scales": scales.t().contiguous(),
        "g_idx": torch.from_numpy(groups).int(),
    }
    return pieces, exact


def awq(weight: np.ndarray, group_size: int = 32, zero_point: bool = True) -> Packed:
    groups = group_index(weight.shape[1], group_size)
    codes, scales, zeros, exact = round_to_nearest(weight, groups, 4, not zero_point)
    pieces = {
        "qweight": words(codes.T, 4, AWQ_ORDER),
        "qzeros": words(zeros.T, 4, AWQ_ORDER),
        "scales": scales.t().contiguous(),
    }
    return pieces, exact


def compressed_packed(
    weight: np.ndarray,
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = True,
    actorder: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Packed:
    height, width = weight.shape
    groups = group_index(width, group_size)
    if actorder:
        groups = np.random.default_rng(width).permutation(groups)
    codes, scales, zeros, exact = round_to_nearest(weight, groups, bits, symmetric, dtype)
    pieces = {
        "weight_packed": words(codes, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor([height, width]),
    }
    if not symmetric:
        pieces["weight_zero_point"] = words(zeros.T, bits).t().contiguous()
    if actorder:
        pieces["weight_g_idx"] = torch.from_numpy(groups).int()
    return pieces, exact


def compressed_int8(
    weight: np.ndarray, strategy: str = "channel", symmetric: bool = True, group_size: int = 32
) -> Packed:
    """strategy: tensor, channel or group."""
    whole = weight.reshape(1, -1) if strategy == "tensor" else weight
    groups = group_index(whole.shape[1], group_size if strategy == "group" else -1)
    codes, scales, zeros, exact = round_to_nearest(whole, groups, 8, symmetric, torch.float32)
    pieces = {
        "weight": torch.from_numpy((codes - 128).astype(np.int8).reshape(weight.shape)),
        "weight_scale": scales.reshape(1) if strategy == "tensor" else scales,
    }
    if not symmetric:
        offsets = torch.from_numpy((zeros - 128).astype(np.int8))
        pieces["weight_zero_point"] = offsets.reshape(1) if strategy == "tensor" else offsets
    return pieces, exact.reshape(weight.shape)


def fp8(
    weight: np.ndarray,
    block: tuple[int, int] | None = None,
    name: str = "weight_scale",
    dtype: torch.dtype = torch.float32,
) -> Packed:
    """block: outputs and inputs that share a scale; None = the whole weight has one, a scalar."""
    height, width = weight.shape
    rows, columns = block or (height, width)
    values = torch.empty(height, width, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-height // rows), -(-width // columns), dtype=dtype)
    exact = np.empty(weight.shape)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            part = torch.from_numpy(weight[at])
            scales[i, j] = part.abs().max() / 400
            values[at] = (part / scales[i, j].float()).to(torch.float8_e4m3fn)
            exact[at] = values[at].double().numpy() * float(scales[i, j])
    return {"weight": values, name: scales if block else scales.squeeze()}, exact

"""What the formats have in common: unpacking integers from words, and putting codes, scales and zero points together.

Knows tensors alone. Raises ValueError, worded to follow the name of a module, where shapes do not fit.
"""

from __future__ import annotations

import math

import torch

from octavo.kernels.matrix import Matrix


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """words: [..., n] int32 → [..., n × 32 / bits] uint8, the lowest bits of a word first."""
    if words.stride(-1) != 1:  # also where the axis is one long, which `contiguous` takes for contiguous
        words = words.clone(memory_format=torch.contiguous_format)
    codes = words.contiguous().view(torch.uint8)
    return codes if bits == 8 else torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)


def of_codes(
    codes: torch.Tensor, bits: int, scales: torch.Tensor, zeros: torch.Tensor | int, groups: torch.Tensor | int
) -> Matrix:
    """w = scale × (code - zero), each input taking its group's.

    codes: [N, K] uint8. scales: [N, G] of any float dtype. zeros: [N, G] of any integer dtype, or one for all.
    groups: [K] on the host, the group of each input; or inputs per group, 0 = all; then the last may be short.

    float16 scales stay float16 unless there are minima that are not exact in it; others become float32.
    """
    width = codes.shape[1]
    index = _group_index(groups, width)
    _expect("scales", scales, (len(codes), int(index.max()) + 1))
    inputs = None
    if isinstance(groups, torch.Tensor):
        index, order = torch.sort(index, stable=True)
        if not torch.equal(order, torch.arange(width)):
            inputs = order.to(codes.device)
            codes = codes[:, inputs]
    step, pick = _steps(index)
    pick = pick.to(scales.device)
    scales = _as_stored(scales)
    zero, mins = 0, None
    if isinstance(zeros, int):
        zero = zeros
    else:
        _expect("zero points", zeros, tuple(scales.shape))
        zero = int(zeros[0, 0])
        if (zeros != zero).any():
            zero, mins = 0, -scales.float() * zeros.float()
            if not torch.equal(mins.to(scales.dtype).float(), mins):
                scales = scales.float()
            mins = mins.to(scales.dtype)[:, pick].contiguous()
    return Matrix(codes.contiguous(), bits, step, scales[:, pick].contiguous(), mins, zero, inputs)


def of_numbers(values: torch.Tensor, scales: torch.Tensor, block: tuple[int, int] | None) -> Matrix:
    """w = scale × value.

    values: [N, K] float8_e4m3fn. scales: with a block of (outputs, inputs), 0 = all of them, one for each block, the
    last ones of which may be short: [⌈N / outputs⌉, ⌈K / inputs⌉]; without, one for each output, or one: [N, 1], [1].
    """
    height, width = values.shape
    if block is None:
        return Matrix(values, 8, width, per_output(scales, height))
    rows, columns = _group_index(block[0], height), _group_index(block[1], width)
    _expect("scales", scales, (int(rows[-1]) + 1, int(columns[-1]) + 1))
    step, pick = _steps(columns)
    rows, pick = rows.to(scales.device), pick.to(scales.device)
    return Matrix(values, 8, step, _as_stored(scales)[rows][:, pick].contiguous())


def per_output(scales: torch.Tensor, height: int) -> torch.Tensor:
    """scales: one, or one for each output, in any shape → [N, 1]."""
    if scales.numel() not in (1, height):
        raise ValueError(f"has {scales.numel()} scales for {height} outputs")
    return _as_stored(scales).reshape(-1, 1).expand(height, 1).contiguous()


def _expect(what: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"has {what} of shape {tuple(tensor.shape)}, its weight asks for {shape}")


def _as_stored(scales: torch.Tensor) -> torch.Tensor:
    return scales if scales.dtype == torch.float16 else scales.float()


def _group_index(groups: torch.Tensor | int, width: int) -> torch.Tensor:
    """[K] int64 on the host, the group of each input: what is asked of it needs no wait for a GPU."""
    if isinstance(groups, int):
        return torch.arange(width) // (groups or width)
    if tuple(groups.shape) != (width,) or int(groups.min()) < 0:
        raise ValueError(f"has groups of shape {tuple(groups.shape)} for its {width} inputs")
    return groups.long()


def _steps(index: torch.Tensor) -> tuple[int, torch.Tensor]:
    """index: [K], ascending → the largest step that no group's end cuts, and the group of each step.

    Where all groups are equally long, these are the groups.
    """
    _, lengths = torch.unique_consecutive(index, return_counts=True)
    step = math.gcd(*lengths.tolist())
    return step, index[::step]

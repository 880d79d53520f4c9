"""Quantizes float weights while they are loaded: no calibration data, one weight at a time.

Knows tensors alone. Which weights are quantized is the caller's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from octavo.engine.errors import ConfigError
from octavo.kernels.matrix import Matrix

GROUP_SIZES = (128, 64, 32)
_FP8_MAX = 448.0  # the largest number of float8_e4m3fn
_HALF = torch.finfo(torch.float16)
_FIT_PASSES = 4
# Rows are worked on a megabyte at a time, so that intermediates stay in a CPU's cache; a GPU wants more to do at once.
_CHUNK_WEIGHTS, _GPU_CHUNK_WEIGHTS = 1 << 18, 1 << 24


class Quantizer(Protocol):
    def __call__(self, weight: torch.Tensor, *, inputs: range | None = None) -> Matrix:
        """weight: [N, K] of any float dtype. inputs: those to keep; None = all. They become what they are in the whole.

        A rank that holds some inputs of a weight so gets the numbers of a single rank: scales are of whole rows.
        """
        ...


def quantizer(name: str) -> Quantizer:
    """int8, int4 or fp8. Raises ConfigError for another name."""
    if name not in QUANTIZERS:
        raise ConfigError(f"quantization {name!r} is not known; known are {', '.join(QUANTIZERS)}.")
    return QUANTIZERS[name]


def int8(weight: torch.Tensor, *, inputs: range | None = None) -> Matrix:
    """Codes around 128, from -127 to 127, one scale per output.

    Scales are float16 where all of them have its full precision, else float32.
    """
    kept = _kept(weight, inputs)
    codes = weight.new_empty(len(weight), len(kept), dtype=torch.uint8)
    scales = torch.cat([_largest(chunk) for _, chunk in _chunks(weight)]) / 127
    half = scales.half()
    if ((half.abs() >= _HALF.tiny) & half.isfinite() | (scales == 0)).all():
        scales = half
    for rows, chunk in _chunks(weight[:, kept.start : kept.stop]):
        steps = (chunk / _divisor(scales[rows].float())).round_().clamp_(-127, 127)  # a scale may be rounded down
        codes[rows] = steps.add_(128).to(torch.uint8)
    return Matrix(codes, 8, len(kept), scales, zero=128)


def fp8(weight: torch.Tensor, *, inputs: range | None = None) -> Matrix:
    """float8_e4m3fn, one float32 scale per output."""
    kept = _kept(weight, inputs)
    values = weight.new_empty(len(weight), len(kept), dtype=torch.float8_e4m3fn)
    scales = weight.new_empty(len(weight), 1, dtype=torch.float32)
    for rows, chunk in _chunks(weight):
        scales[rows] = _largest(chunk) / _FP8_MAX
        mine = chunk[:, kept.start : kept.stop] / _divisor(scales[rows])
        values[rows] = mine.clamp_(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn)
    return Matrix(values, 8, len(kept), scales)


def int4(weight: torch.Tensor, group_size: int = GROUP_SIZES[-1], *, inputs: range | None = None) -> Matrix:
    """4-bit codes with a float16 scale and minimum per group of inputs.

    Where group_size does not divide K, the next smaller of GROUP_SIZES that does is taken; where none does, int8.
    """
    width = weight.shape[1]
    size = next((size for size in (group_size, *GROUP_SIZES) if size <= group_size and width % size == 0), 0)
    if not size:
        return int8(weight, inputs=inputs)
    kept = _kept(weight, inputs)
    first, last = kept.start // size * size, -(-kept.stop // size) * size
    return _int4(weight[:, first:last], size).narrow(1, kept.start - first, len(kept))


def _int4(weight: torch.Tensor, group_size: int) -> Matrix:
    """weight: [N, K], K whole groups."""
    codes = weight.new_empty(weight.shape, dtype=torch.uint8)
    scales = weight.new_empty(weight.shape[0], weight.shape[1] // group_size, dtype=torch.float16)
    mins = torch.empty_like(scales)
    for rows, chunk in _chunks(weight):
        groups = chunk.reshape(len(chunk), -1, group_size)
        scale, minimum = (part.half() for part in _fit(groups))
        codes[rows] = _nearest(groups, scale.float(), minimum.float()).view_as(chunk).to(torch.uint8)
        scales[rows], mins[rows] = scale.squeeze(2), minimum.squeeze(2)
    return Matrix(codes, 4, group_size, scales, mins)


def _kept(weight: torch.Tensor, inputs: range | None) -> range:
    return range(weight.shape[1]) if inputs is None else inputs


QUANTIZERS: dict[str, Quantizer] = {"int8": int8, "int4": int4, "fp8": fp8}


def _chunks(weight: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Some rows at a time: where they are, and they in float32."""
    together = _CHUNK_WEIGHTS if weight.device.type == "cpu" else _GPU_CHUNK_WEIGHTS
    step = max(1, together // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        yield rows, weight[rows].float()


def _largest(weight: torch.Tensor) -> torch.Tensor:
    """[N, 1]: the largest absolute weight of each row."""
    low, high = weight.aminmax(dim=1, keepdim=True)
    return torch.maximum(-low, high)


def _divisor(scales: torch.Tensor) -> torch.Tensor:
    """A row of zeros has scale 0, and stays zeros if divided by 1."""
    return scales.masked_fill(scales == 0, 1)


def _fit(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """groups: [n, G, g] → scale and minimum, [n, G, 1] each, of little squared error.

    From the scale that spans the group, rounding to codes and the least squares fit to these codes take turns. Neither
    can raise the error, and a few turns find the better part of what clipping the outliers of a group gains.
    """
    low, high = groups.aminmax(dim=2, keepdim=True)
    above = groups - low  # so that the sums below do not cancel where a group lies far from zero
    scale, offset = (high - low) / 15, torch.zeros_like(low)
    mean = above.mean(2, keepdim=True)
    for _ in range(_FIT_PASSES):
        codes = _nearest(above, scale, offset)
        middle = codes.mean(2, keepdim=True)
        codes -= middle
        spread = codes.square().sum(2, keepdim=True)
        scale = (codes * above).sum(2, keepdim=True) / spread.masked_fill(spread == 0, 1)
        offset = mean - scale * middle
    return scale, low + offset


def _nearest(groups: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
    """The codes 0 to 15, as floats, that come nearest."""
    return (groups - minimum).div_(_divisor(scale)).round_().clamp_(0, 15)

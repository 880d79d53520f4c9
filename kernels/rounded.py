"""Rows rounded to 8 bits, on their way from the op that makes them to the matmul that multiplies with them.

A matmul of 8-bit weights rounds its inputs. Where the op before it can do so as it writes them, a launch and a reading
of the rows are saved: `octavo.kernels.ops.RoundingOf` says what a weight asks for, norms and gated activations take
that as `rounding` and give Rounded, and `linear` takes it in place of x. Knows tensors alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Rounding:
    """What rows become. dtype: int8 or float8_e4m3fn. group_size: inputs that share a scale; it divides a row."""

    dtype: torch.dtype
    group_size: int


@dataclass(frozen=True, slots=True)
class Rounded:
    """Rows [T, K] as values * scales. values: [T, K] int8 or float8_e4m3fn, contiguous. scales: [T, K / group_size]
    float32, NaN where a group was not finite. dtype: the rows' before they were rounded, which a product has too.

    Exactly what the rows in `dtype` become when they are rounded by themselves: whoever makes them rounds twice, to
    dtype and from there to 8 bits.
    """

    values: torch.Tensor
    scales: torch.Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def rounding(self) -> Rounding:
        return Rounding(self.values.dtype, self.values.shape[1] // self.scales.shape[1])

    def numbers(self) -> torch.Tensor:
        """[T, K] float32."""
        return (self.values.float().unflatten(1, (self.scales.shape[1], -1)) * self.scales.unsqueeze(2)).flatten(1)

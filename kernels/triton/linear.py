"""Linear layers and embeddings. Contracts: `octavo.kernels.ops`; layouts: `pack`.

What x is rounded to differs from a CPU's, as on every engine of this field: with float8 weights it becomes float8, one
scale per row (or per row and group, of weights with scales in blocks); with 8-bit codes around 128 int8, as on a CPU;
with other codes it stays as it is. A float32 x and float8 weights multiply as numbers: exact, slow, for comparisons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from octavo.kernels.matrix import Matrix, alike, join
from octavo.kernels.rounded import Rounded, Rounding
from octavo.kernels.triton.codes_matmul import codes_matmul
from octavo.kernels.triton.pack import Codes, Numbers, Scaled8, Section, pack
from octavo.kernels.triton.quantize_rows import quantize_rows
from octavo.kernels.triton.scaled_matmul import scaled_matmul


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight whose outputs are those of its sections, one after the other. widths: outputs of each."""

    sections: tuple[Section, ...]
    widths: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return sum(section.nbytes for section in self.sections)


def pack_linear(matrices: Sequence[Matrix]) -> PackedLinear:
    joined = [join(neighbours) for neighbours in alike(matrices)]
    return PackedLinear(tuple(pack(matrix) for matrix in joined), tuple(matrix.shape[0] for matrix in joined))


def rounding_of(weight: PackedLinear, dtype: torch.dtype) -> Rounding | None:
    """None also where sections of a weight want x in several ways, and where it comes in another order."""
    wanted = {_rounding(section, dtype) for section in weight.sections}
    return wanted.pop() if len(wanted) == 1 else None


def linear(x: torch.Tensor | Rounded, weight: PackedLinear, bias: torch.Tensor | None = None) -> torch.Tensor:
    if len(weight.sections) == 1:
        return _multiply(x, weight.sections[0], bias)
    biases = [None] * len(weight.widths) if bias is None else bias.split(weight.widths)
    products = [_multiply(x, section, part) for section, part in zip(weight.sections, biases, strict=True)]
    return torch.cat(products, dim=1)


def embedding(ids: torch.Tensor, weight: PackedLinear, dtype: torch.dtype) -> torch.Tensor:
    (section,) = weight.sections
    return section.rows(ids, dtype)


def _rounding(section: Section, dtype: torch.dtype) -> Rounding | None:
    if not isinstance(section, Scaled8) or section.order is not None or _as_numbers(section, dtype):
        return None
    return Rounding(section.values.dtype, section.group_size)


def _as_numbers(section: Scaled8, dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and section.values.dtype == torch.float8_e4m3fn


def _multiply(x: torch.Tensor | Rounded, section: Section, bias: torch.Tensor | None) -> torch.Tensor:
    if isinstance(x, Rounded):
        assert isinstance(section, Scaled8), "rounded for another weight"
        assert x.rounding == _rounding(section, x.dtype), "rounded for another weight"
        return _multiply_rounded(x, section, bias)
    if isinstance(section, Numbers):
        return F.linear(x, section.values.to(x.dtype), bias)
    if section.order is not None:
        x = x[:, section.order]
    if isinstance(section, Codes):
        if not x.numel():
            return x.new_empty(len(x), section.scales.shape[1])
        return codes_matmul(x, section.codes, section.scales, section.mins, section.zero, bias)
    if _as_numbers(section, x.dtype):
        every = torch.arange(len(section.values), device=x.device)
        # x is in the order of places, as the values are
        return F.linear(x, section.numbers(every), bias)
    return _multiply_rounded(quantize_rows(x, Rounding(section.values.dtype, section.group_size)), section, bias)


def _multiply_rounded(x: Rounded, section: Scaled8, bias: torch.Tensor | None) -> torch.Tensor:
    if not x.values.numel():
        return torch.empty(len(x.values), len(section.values), dtype=x.dtype, device=x.values.device)
    return scaled_matmul(x.values, section.values, x.scales, section.scales, section.group_size, bias, x.dtype)

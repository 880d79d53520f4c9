"""Linear layers and embeddings over Matrices as they are: a weight is dequantized in every call."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from octavo.kernels.matrix import Matrix, alike, join
from octavo.kernels.rounded import Rounded, Rounding

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def pack_linear(matrices: Sequence[Matrix]) -> tuple[Matrix, ...]:
    return tuple(join(neighbours) for neighbours in alike(matrices))


def rounding_of(weight: tuple[Matrix, ...], dtype: torch.dtype) -> Rounding | None:
    """Every matrix rounds by itself: the definition has no launches to save."""
    return None


def linear(x: torch.Tensor | Rounded, weight: tuple[Matrix, ...], bias: torch.Tensor | None = None) -> torch.Tensor:
    if isinstance(x, Rounded):
        out = torch.cat([torch.nn.functional.linear(x.numbers(), matrix.dequantize()) for matrix in weight], dim=1)
    else:
        out = torch.cat([_multiply(x, matrix) for matrix in weight], dim=1)
    return (out if bias is None else out + bias.float()).to(x.dtype)


def embedding(ids: torch.Tensor, weight: tuple[Matrix, ...], dtype: torch.dtype) -> torch.Tensor:
    (matrix,) = weight
    return matrix.permute_outputs(ids).dequantize(dtype)


def _multiply(x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    """In the order of the matrix's inputs, which is the order in which x is rounded too."""
    x = x.float() if matrix.inputs is None else x.float()[:, matrix.inputs]
    if matrix.values.dtype == torch.uint8:
        x = round_rows(x, Rounding(torch.int8, matrix.group_size)).numbers()
    return torch.nn.functional.linear(x, replace(matrix, inputs=None).dequantize())


def round_rows(x: torch.Tensor, rounding: Rounding) -> Rounded:
    """x [T, K]: to the nearest, ties to even, of 127 steps or of the numbers of float8, the largest of a group to 448.
    A group with an infinity or NaN gets the scale NaN."""
    groups = x.float().unflatten(1, (-1, rounding.group_size))
    largest = LARGEST[rounding.dtype]
    top = groups.abs().amax(dim=2, keepdim=True)
    inverse = torch.full_like(top, largest) / top  # not 127 / top, which is 127 * (1 / top)
    rounds = inverse.isfinite()
    steps = torch.where(top.isfinite(), groups * torch.where(rounds, inverse, 0), 0).flatten(1)
    values = steps.round() if rounding.dtype == torch.int8 else steps.clamp(-largest, largest)
    scales = torch.where(top.isfinite(), torch.where(rounds, top / largest, 0), torch.nan)
    return Rounded(values.to(rounding.dtype), scales.squeeze(2), x.dtype)

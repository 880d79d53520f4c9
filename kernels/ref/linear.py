"""Linear layers and embeddings over Matrices as they are: a weight is dequantized in every call."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from octavo.kernels.matrix import Matrix


def pack_linear(matrices: Sequence[Matrix]) -> tuple[Matrix, ...]:
    return tuple(matrices)


def linear(x: torch.Tensor, weight: tuple[Matrix, ...], bias: torch.Tensor | None = None) -> torch.Tensor:
    out = torch.cat([_multiply(x, matrix) for matrix in weight], dim=1)
    return (out if bias is None else out + bias.float()).to(x.dtype)


def embedding(ids: torch.Tensor, weight: tuple[Matrix, ...], dtype: torch.dtype) -> torch.Tensor:
    (matrix,) = weight
    return matrix.permute_outputs(ids).dequantize(dtype)


def _multiply(x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    """In the order of the matrix's inputs, which is the order in which x is rounded too."""
    x = x.float() if matrix.inputs is None else x.float()[:, matrix.inputs]
    if matrix.values.dtype == torch.uint8:
        x = _round_to_int8(x, matrix.group_size)
    return torch.nn.functional.linear(x, replace(matrix, inputs=None).dequantize())


def _round_to_int8(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """x [T, K] as multiples of a scale per row and group: [T, K] float32. What is not finite stays so."""
    groups = x.unflatten(1, (-1, group_size))
    top = groups.abs().amax(dim=2, keepdim=True)
    inverse = torch.full_like(top, 127) / top  # not 127 / top, which is 127 * (1 / top)
    rounds = inverse.isfinite()
    values = (groups * torch.where(rounds, inverse, 0)).round() * torch.where(rounds, top / 127, 0)
    return torch.where(top.isfinite(), values, torch.nan).flatten(1)

"""Linear layers and embeddings over a Matrix as it is: the weight is dequantized in every call."""

from dataclasses import replace

import torch

from octavo.kernels.matrix import Matrix


def pack_linear(matrix: Matrix) -> Matrix:
    return matrix


def linear(x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    rounded = round_to_int8(x, weight) if weight.values.dtype == torch.uint8 else x.float()
    out = torch.nn.functional.linear(rounded, replace(weight, inputs=None).dequantize())
    return (out if bias is None else out + bias.float()).to(x.dtype)


def embedding(ids: torch.Tensor, weight: Matrix, dtype: torch.dtype) -> torch.Tensor:
    return weight.permute_outputs(ids).dequantize(dtype)


def round_to_int8(x: torch.Tensor, weight: Matrix) -> torch.Tensor:
    """x [T, K] as multiples of a scale per row and group of the weight: [T, K] float32. Not finite stays not finite."""
    groups = x.float().unflatten(1, (-1, weight.group_size))
    top = groups.abs().amax(dim=2, keepdim=True)
    inverse = torch.full_like(top, 127) / top  # not 127 / top, which is 127 * (1 / top)
    rounds = inverse.isfinite()
    values = (groups * torch.where(rounds, inverse, 0)).round() * torch.where(rounds, top / 127, 0)
    return torch.where(top.isfinite(), values, torch.nan).flatten(1)

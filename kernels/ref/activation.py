"""Activations. Shapes and contracts: `octavo.kernels.ops`."""

import torch
import torch.nn.functional as F

from octavo.kernels.ref.linear import round_rows
from octavo.kernels.rounded import Rounded, Rounding


def silu_and_mul(x: torch.Tensor, rounding: Rounding | None = None) -> torch.Tensor | Rounded:
    gate, up = x.chunk(2, dim=-1)
    result = F.silu(gate).mul_(up)
    return result if rounding is None else round_rows(result, rounding)


def gelu_tanh_and_mul(x: torch.Tensor, rounding: Rounding | None = None) -> torch.Tensor | Rounded:
    gate, up = x.chunk(2, dim=-1)
    result = F.gelu(gate, approximate="tanh").mul_(up)
    return result if rounding is None else round_rows(result, rounding)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")

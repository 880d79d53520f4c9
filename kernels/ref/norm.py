"""Root mean square norms. Shapes and contracts: `octavo.kernels.ops`."""

import torch
import torch.nn.functional as F

from octavo.kernels.ref.linear import round_rows
from octavo.kernels.rounded import Rounded, Rounding


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, rounding: Rounding | None = None
) -> torch.Tensor | Rounded:
    result = F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(x.dtype)
    return result if rounding is None else round_rows(result, rounding)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, rounding: Rounding | None = None
) -> tuple[torch.Tensor | Rounded, torch.Tensor]:
    total = x + residual
    return rms_norm(total, weight, eps, rounding), total

"""Norms over the last axis. Replicated on every rank."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from octavo.engine.layers.context import BuildContext
from octavo.engine.layers.weight import Layer, ShardRule, Weight, whole_part
from octavo.engine.parallel.mesh import Unsummed
from octavo.kernels.rounded import Rounded, Rounding


class RMSNorm(Layer):
    """x / rms(x) * weight.

    `offset`: the checkpoint stores weight - offset (Gemma: 1). It is added once, at load, and the weight kept in
    float32, because 1 + w loses w's low bits in half precision. `rounding`: set by the one layer that reads the
    norm, if it wants it rounded (see Linear.fed_by).
    """

    def __init__(self, ctx: BuildContext, width: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.eps, self.offset, self.ops = eps, offset, ctx.ops
        self.rounding: Rounding | None = None
        dtype = torch.float32 if offset else ctx.dtype
        self.weight = Weight((width,), ShardRule(0, (whole_part(width),)), dtype, ctx.device)

    def load(self, name: str, part: str | None, tensor: torch.Tensor) -> None:
        super().load(name, part, tensor.float() + self.offset if self.offset else tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor | Rounded:
        return self.ops.rms_norm(x, self.weight, self.eps, self.rounding)

    def add(self, x: torch.Tensor | Unsummed, residual: torch.Tensor) -> tuple[torch.Tensor | Rounded, torch.Tensor]:
        """(norm(x + residual), x + residual). Both inputs are given up."""
        if isinstance(x, Unsummed):
            both = x.group.sum_add_rms_norm(x.part, residual, self.weight, self.eps, self.rounding)
            if both is not None:
                return both
            x = x.add_up()
        return self.ops.add_rms_norm(x, residual, self.weight, self.eps, self.rounding)


class LayerNorm(Layer):
    """(x - mean(x)) / std(x) * weight + bias. `affine` false: no weight, no bias."""

    def __init__(self, ctx: BuildContext, width: int, eps: float, affine: bool = True) -> None:
        super().__init__()
        self.width, self.eps = (width,), eps
        rule = ShardRule(0, (whole_part(width),))
        self.weight = Weight((width,), rule, ctx.dtype, ctx.device) if affine else None
        self.bias = Weight((width,), rule, ctx.dtype, ctx.device) if affine else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.width, self.weight, self.bias, self.eps)

"""How a linear layer keeps and applies its weight: the one seam between models and number formats."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F

from octavo.engine.layers.weight import ShardRule, Weight


class LinearMethod(Protocol):
    """One number format. Stateless: what it keeps, it keeps on the layer (a `octavo.engine.layers.linear.Linear`)."""

    def create(self, layer: Any, shape: tuple[int, int], rule: ShardRule) -> None:
        """Register the parameters that will hold the layer's weight, [out, in] on this rank."""

    def load(self, layer: Any, name: str, part: str | None, tensor: torch.Tensor) -> None:
        """Take one checkpoint tensor: the parameter called `name`, of `part` (None: all parts, in order)."""

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x: [T, in] → [T, out], in x's dtype."""


class Unquantized:
    """The weight as it is, in the model's dtype."""

    def create(self, layer: Any, shape: tuple[int, int], rule: ShardRule) -> None:
        layer.weight = Weight(shape, rule, layer.dtype, layer.device)

    def load(self, layer: Any, name: str, part: str | None, tensor: torch.Tensor) -> None:
        getattr(layer, name).fill(part, tensor)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, layer.weight, bias)

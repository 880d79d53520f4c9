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

    def expects(self, layer: Any) -> dict[str, Weight]:
        """See `Layer.expects`, without the bias, which is the layer's own."""

    def load(self, layer: Any, name: str, part: str | None, tensor: torch.Tensor) -> None:
        """Take one checkpoint tensor that `expects` names, of `part` (None: all parts, in order)."""

    def finish(self, layer: Any) -> None:
        """All of the layer's tensors are loaded: bring the weight into the form that `apply` wants. Called once."""

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x: [T, in] → [T, out], in x's dtype."""

    def project(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """x: [T, in]; table: [out, in] as it is, because others read it too (a tied head) → [T, out]."""


class Unquantized:
    """The weight as it is, in the model's dtype."""

    def create(self, layer: Any, shape: tuple[int, int], rule: ShardRule) -> None:
        layer.weight = Weight(shape, rule, layer.dtype, layer.device)

    def expects(self, layer: Any) -> dict[str, Weight]:
        return {"weight": layer.weight}

    def load(self, layer: Any, name: str, part: str | None, tensor: torch.Tensor) -> None:
        layer.weight.fill(part, tensor)

    def finish(self, layer: Any) -> None:
        pass

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, layer.weight, bias)

    def project(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return F.linear(x, table)

"""How a layer keeps and applies its weight matrix: the one seam between models and number formats."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F

from octavo.engine.layers.weight import ShardRule, Source, Weight
from octavo.kernels.rounded import Rounded, Rounding


class LinearMethod(Protocol):
    """One way to keep a matrix [out, in]. What it keeps, it keeps on the layer: linear, embedding or head.

    cut_unit: a power of two. Inputs cut at its multiples give each rank the very numbers of the whole matrix, rounded
    in the same company; cut elsewhere, groups of inputs that share a scale become smaller.
    """

    cut_unit: int

    def create(self, layer: Any, shape: tuple[int, int], rule: ShardRule) -> None:
        """Register what will hold the layer's matrix, [out, in] on this rank."""

    def expects(self, layer: Any) -> dict[str, Weight]:
        """See `Layer.expects`, without the bias, which is the layer's own."""

    def load(self, layer: Any, name: str, part: str | None, tensor: Source) -> None:
        """Take one checkpoint tensor that `expects` names, of `part` (None: all parts, in order)."""

    def finish(self, layer: Any) -> None:
        """All of the layer's tensors are loaded: bring the matrix into the form that `apply` wants. Called once."""

    def rounding(self, layer: Any) -> Rounding | None:
        """What `apply` rounds x to, and may be given rounded already; None = it wants x as it is. After `finish`."""

    def apply(self, layer: Any, x: torch.Tensor | Rounded, bias: torch.Tensor | None) -> torch.Tensor:
        """x: [T, in] → [T, out], in x's dtype, which may be wider than the matrix's. Rounded: as `rounding` says."""

    def rows(self, layer: Any, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows index [T] of the matrix: [T, in] in dtype."""


class Unquantized:
    """The matrix as a plain parameter in the model's dtype."""

    cut_unit = 16  # whole vectors

    def create(self, layer: Any, shape: tuple[int, int], rule: ShardRule) -> None:
        layer.weight = Weight(shape, rule, layer.dtype, layer.device)

    def expects(self, layer: Any) -> dict[str, Weight]:
        return {"weight": layer.weight}

    def load(self, layer: Any, name: str, part: str | None, tensor: Source) -> None:
        layer.weight.fill(part, tensor)

    def finish(self, layer: Any) -> None:
        pass

    def rounding(self, layer: Any) -> Rounding | None:
        return None

    def apply(self, layer: Any, x: torch.Tensor | Rounded, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, layer.weight.to(x.dtype), bias)

    def rows(self, layer: Any, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return F.embedding(index, layer.weight).to(dtype)

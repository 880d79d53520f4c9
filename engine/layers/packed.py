"""Matrices in the layout of the `linear` op, whatever their number format.

A checkpoint's tensors come as floats or as a `Matrix` in its own format, and stay in it. Nothing is allocated before
they come, and a layer's are packed as soon as it has them all, so that loading needs little more memory than the
finished model. Knows no format by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from octavo.engine.errors import ConfigError
from octavo.engine.layers.weight import ShardRule, Weight
from octavo.kernels.matrix import Matrix, join
from octavo.kernels.ops import Ops, Packed

Quantize = Callable[[torch.Tensor], Matrix]
META = torch.device("meta")
# The most inputs that are rounded to 8 bits with one scale. A few inputs of a model are ten times larger than the rest
# and would take the precision of all that share their scale: over whole rows of SmolLM2 that costs 3.7 % of perplexity,
# in groups of 64 it costs 0.9 % (benchmarks/LOG.md).
ROUNDED_TOGETHER = 64


class PackedMethod:
    """A `LinearMethod`.

    quantize: what becomes of tensors that come as floats; None = they stay floats: in the model's dtype, but for
    float32, where a tensor that is exactly bfloat16 stays so and is widened as it is read: the same products from half
    the bytes. dequantize: tensors that come quantized become floats.
    """

    def __init__(self, ops: Ops, quantize: Quantize | None = None, dequantize: bool = False) -> None:
        self.ops, self.quantize, self.dequantize = ops, quantize, dequantize

    def create(self, layer: Any, shape: tuple[int, int], rule: ShardRule) -> None:
        layer.weight = Weight(shape, rule, layer.dtype, META)
        layer.pieces = []
        layer.packed = None

    def expects(self, layer: Any) -> dict[str, Weight]:
        return {"weight": layer.weight}

    def load(self, layer: Any, name: str, part: str | None, tensor: torch.Tensor | Matrix) -> None:
        weight: Weight = layer.weight
        weight.check(part, tensor.shape)
        matrix = self._matrix(tensor, layer.dtype)
        axis, at = weight.rule.axis, 0
        for p in weight.parts(part):
            try:
                mine = matrix.narrow(axis, at + p.source, p.size)
            except ValueError as error:
                raise ConfigError(f"cannot be cut over ranks: {error}") from None
            layer.pieces.append((p.start, mine.to(layer.device)))
            at += p.whole

    def finish(self, layer: Any) -> None:
        pieces = [matrix for _, matrix in sorted(layer.pieces, key=lambda piece: piece[0])]
        lacking = layer.weight.shape[0] - sum(matrix.shape[0] for matrix in pieces)
        if layer.weight.rule.axis == 0 and lacking:
            pieces.append(pieces[-1].zeros(lacking))
        layer.packed = self.ops.pack_linear(_merged([_with_small_groups(matrix) for matrix in pieces]))
        del layer.weight, layer.pieces

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        packed: Packed = layer.packed
        return self.ops.linear(x, packed, bias)

    def rows(self, layer: Any, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self.ops.embedding(index, layer.packed, dtype)

    def _matrix(self, tensor: torch.Tensor | Matrix, dtype: torch.dtype) -> Matrix:
        if isinstance(tensor, Matrix):
            if not self.dequantize:
                return tensor
            tensor = tensor.dequantize()
        if self.quantize is not None:
            return self.quantize(tensor)
        return Matrix(_as_bfloat16(tensor) if dtype == torch.float32 else tensor.to(dtype))


def _as_bfloat16(tensor: torch.Tensor) -> torch.Tensor:
    """In bfloat16 where that is exact, else in float32."""
    short = tensor.to(torch.bfloat16)
    return short if short.dtype == tensor.dtype or torch.equal(short.to(tensor.dtype), tensor) else tensor.float()


def _with_small_groups(matrix: Matrix) -> Matrix:
    return matrix.split_groups(ROUNDED_TOGETHER) if matrix.values.dtype == torch.uint8 else matrix


def _merged(pieces: Sequence[Matrix]) -> list[Matrix]:
    """Neighbours of the same form become one, so that most layers are a single product."""
    groups: list[list[Matrix]] = []
    for piece in pieces:
        if groups and groups[-1][0].form == piece.form:
            groups[-1].append(piece)
        else:
            groups.append([piece])
    return [join(group) for group in groups]

"""Matrices in the layout of the `linear` op, whatever their number format.

A checkpoint's tensors come as floats or as a `Matrix` in its own format, and stay in it. Nothing is allocated before
they come, and a layer's are packed as soon as it has them all, so that loading needs little more memory than the
finished model. Knows no format by name.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from octavo.engine.layers.weight import ShardRule, Source, Weight, as_floats, read
from octavo.kernels.matrix import Matrix
from octavo.kernels.ops import Ops, Packed
from octavo.kernels.rounded import Rounded, Rounding


class Quantize(Protocol):
    def __call__(self, weight: torch.Tensor, *, inputs: range | None = None) -> Matrix:
        """weight: [N, K]. inputs: those to keep; None = all. They become what they are in the whole."""
        ...


META = torch.device("meta")
# The most inputs that are rounded to 8 bits with one scale. A few inputs of a model are ten times larger than the rest
# and would take the precision of all that share their scale: over whole rows of SmolLM2 that costs 3.7 % of perplexity,
# in groups of 64 it costs 0.9 % (benchmarks/LOG.md).
ROUNDED_TOGETHER = 64
_CHUNK_WEIGHTS = 1 << 18  # a megabyte, which stays in a CPU's cache


class PackedMethod:
    """A `LinearMethod`.

    quantize: what becomes of tensors that come as floats; None = they stay floats: in the model's dtype, but for
    float32, where a tensor that is exactly bfloat16 stays so and is widened as it is read: the same products from half
    the bytes. dequantize: tensors that come quantized become floats.
    """

    cut_unit = ROUNDED_TOGETHER

    def __init__(self, ops: Ops, quantize: Quantize | None = None, dequantize: bool = False) -> None:
        self.ops, self.quantize, self.dequantize = ops, quantize, dequantize

    def create(self, layer: Any, shape: tuple[int, int], rule: ShardRule) -> None:
        layer.weight = Weight(shape, rule, layer.dtype, META)
        layer.weight.takes_whole = self.quantize is not None and rule.axis == 1
        layer.pieces = []
        layer.packed = None

    def expects(self, layer: Any) -> dict[str, Weight]:
        return {"weight": layer.weight}

    def load(self, layer: Any, name: str, part: str | None, tensor: Source) -> None:
        weight: Weight = layer.weight
        (first, *_) = weight.parts(part)
        if weight.rule.axis == 1 and self._quantizes(tensor) and first.size != first.whole:
            # A scale is of all inputs of an output, also of those that other ranks have.
            weight.check(part, tensor.shape)
            assert self.quantize is not None
            mine = self.quantize(as_floats(read(tensor)), inputs=range(first.source, first.source + first.size))
            layer.pieces.append((first.start, mine.to(layer.device)))
            return
        for p, piece in weight.cut(part, tensor):
            layer.pieces.append((p.start, self._matrix(piece, layer.dtype).to(layer.device)))

    def finish(self, layer: Any) -> None:
        pieces = [matrix for _, matrix in sorted(layer.pieces, key=lambda piece: piece[0])]
        layer.packed = self.ops.pack_linear([_with_small_groups(matrix) for matrix in pieces])
        del layer.weight, layer.pieces

    def rounding(self, layer: Any) -> Rounding | None:
        return self.ops.rounding_of(layer.packed, layer.dtype)

    def apply(self, layer: Any, x: torch.Tensor | Rounded, bias: torch.Tensor | None) -> torch.Tensor:
        packed: Packed = layer.packed
        return self.ops.linear(x, packed, bias)

    def rows(self, layer: Any, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self.ops.embedding(index, layer.packed, dtype)

    def _quantizes(self, source: Source) -> bool:
        return self.quantize is not None and (self.dequantize or isinstance(source, torch.Tensor))

    def _matrix(self, tensor: torch.Tensor | Matrix, dtype: torch.dtype) -> Matrix:
        if isinstance(tensor, Matrix):
            if tensor.scales is not None and not self.dequantize:
                return tensor
            tensor = tensor.dequantize()
        if self.quantize is not None:
            return self.quantize(tensor)
        return Matrix(_as_bfloat16(tensor) if dtype == torch.float32 else tensor.to(dtype))


def _as_bfloat16(tensor: torch.Tensor) -> torch.Tensor:
    """In bfloat16 where that is exact, else in float32. Asked row by row, some at a time: mostly the first tell."""
    together = _CHUNK_WEIGHTS if tensor.device.type == "cpu" else tensor.numel()  # an answer of a GPU is waited for
    rows = max(1, together // max(1, tensor.shape[1]))
    exact = tensor.dtype == torch.bfloat16 or all(
        torch.equal(part.to(torch.bfloat16).to(part.dtype), part) for part in tensor.split(rows)
    )
    return tensor.to(torch.bfloat16) if exact else tensor.float()


def _with_small_groups(matrix: Matrix) -> Matrix:
    return matrix.split_groups(ROUNDED_TOGETHER) if matrix.values.dtype == torch.uint8 else matrix

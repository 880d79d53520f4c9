"""Linear layers through oneDNN, which torch brings along, with the weight in the layout that its kernels read.

On CPU only. F.linear takes float32 products to MKL, whose kernels for processors of other makers are half as fast, and
lays the weight out anew in every call (benchmarks/matmul_cpu.py).
"""

from __future__ import annotations

from typing import Any

import torch

from octavo.engine.layers.linear_method import Unquantized

DTYPES = (torch.float32, torch.bfloat16)


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch has oneDNN's linear for the device and dtype."""
    return (
        device.type == "cpu"
        and dtype in DTYPES
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and (dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x: [T, in]; weight: [out, in], plain or of `pack` → [T, out]."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def pack(weight: torch.Tensor) -> torch.Tensor:
    """A copy of weight [out, in] in oneDNN's own layout, the same for every number of rows. Only `linear` reads it."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)


class OneDNN(Unquantized):
    """The weight in the model's dtype, packed once it is loaded; the original is freed."""

    def finish(self, layer: Any) -> None:
        packed = pack(layer.weight.data)
        del layer.weight
        layer.packed = packed

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return linear(x, layer.packed, bias)

    def project(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return linear(x, table)

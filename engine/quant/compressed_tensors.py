"""compressed-tensors' tensors of a module → its Matrix.

pack-quantized: weight_packed [N, ⌈K × bits / 32⌉] int32, weight_shape [2] = (N, K), weight_scale [N, G],
weight_zero_point [⌈N × bits / 32⌉, G] int32, packed along the outputs, weight_g_idx [K]. Numbers from -2^(bits-1) up
are stored as codes from 0 up, lowest bits first; so are zero points. w = scale × (number - zero).
int-quantized and naive-quantized: weight [N, K] int8; weight_scale [N, G], [N, 1] or [1]; weight_zero_point alike.
Source: compressed_tensors/compressors/quantized_compressors (github.com/vllm-project/compressed-tensors).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from octavo.engine.quant.groups import of_codes, per_output, unpack
from octavo.engine.quant.scheme import Ints, Packed
from octavo.kernels.matrix import Matrix


def packed(form: Packed, pieces: Mapping[str, torch.Tensor]) -> Matrix:
    """pieces: as above; zero points and g_idx if the form has them. Raises ValueError."""
    height, width = pieces["weight_shape"].tolist()
    codes = unpack(pieces["weight_packed"], form.bits)[:, :width]
    if tuple(codes.shape) != (height, width):
        raise ValueError(f"has packed weights of shape {tuple(codes.shape)}, its weight_shape is {(height, width)}")
    zeros: torch.Tensor | int = 1 << form.bits - 1
    if form.zero_point:
        zeros = unpack(pieces["weight_zero_point"].t(), form.bits).t()[:height]
    groups = pieces["weight_g_idx"] if form.reordered else form.group_size
    return of_codes(codes, form.bits, _scales(form, pieces["weight_scale"], height), zeros, groups)


def ints(form: Ints, pieces: Mapping[str, torch.Tensor]) -> Matrix:
    """pieces: as above; zero points if the form has them. Raises ValueError."""
    weight, middle = pieces["weight"], 1 << form.bits - 1
    codes = weight.view(torch.uint8) + middle  # wraps around, as it should
    zeros: torch.Tensor | int = middle
    if form.zero_point:
        zeros = pieces["weight_zero_point"].short() + middle
        zeros = zeros if form.group_size else zeros.reshape(-1, 1).expand(len(weight), 1)
    return of_codes(codes, form.bits, _scales(form, pieces["weight_scale"], len(weight)), zeros, form.group_size)


def _scales(form: Packed | Ints, scales: torch.Tensor, height: int) -> torch.Tensor:
    return scales if form.group_size else per_output(scales, height)

"""FP8 tensors of a module → its Matrix.

weight: [N, K] float8_e4m3fn; one scale for all, one for each output, or one for each block of 128 × 128. It is called
weight_scale, or weight_scale_inv (by which the quantizer divided by its inverse); either way w = scale × value.
Sources: transformers' FineGrainedFP8 integration, vLLM's fp8 checkpoints, compressed-tensors' float-quantized.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from octavo.engine.quant.groups import of_numbers
from octavo.engine.quant.scheme import Floats
from octavo.kernels.matrix import Matrix


def matrix(form: Floats, pieces: Mapping[str, torch.Tensor]) -> Matrix:
    """pieces: weight, weight_scale. Raises ValueError."""
    return of_numbers(pieces["weight"], pieces["weight_scale"], form.block)

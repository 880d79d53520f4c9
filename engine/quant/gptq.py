"""GPTQ's tensors of a module → its Matrix.

qweight: [K × bits / 32, N] int32, codes packed along the inputs; qzeros: [G, N × bits / 32] int32, packed along the
outputs; scales: [G, N] float16; g_idx: [K] int32, the group of each input (quantized in the order of activation sizes).
Lowest bits first. w = scale × (code - zero).
Sources: AutoGPTQ's QuantLinear (github.com/AutoGPTQ/AutoGPTQ) and GPTQModel's conversion between the first checkpoint
format and gptq_v2 (github.com/ModelCloud/GPTQModel).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from octavo.engine.quant.groups import of_codes, unpack
from octavo.engine.quant.scheme import GPTQ
from octavo.kernels.matrix import Matrix

# One added to every zero point of a word. As a whole word, carries included: that undoes the subtraction it was
# written with, also for zero points of 0, whose borrows run into their neighbours.
_ONES = {4: 0x11111111, 8: 0x01010101}


def matrix(form: GPTQ, pieces: Mapping[str, torch.Tensor]) -> Matrix:
    """pieces: qweight, qzeros, scales, and g_idx if the form is reordered. Raises ValueError."""
    codes = unpack(pieces["qweight"].t(), form.bits)
    words = pieces["qzeros"] + _ONES[form.bits] if form.one_less else pieces["qzeros"]
    zeros = unpack(words, form.bits).t()
    groups = pieces["g_idx"] if form.reordered else form.group_size
    return of_codes(codes, form.bits, pieces["scales"].t(), zeros, groups)

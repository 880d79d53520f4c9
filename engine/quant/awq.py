"""AWQ's tensors of a module → its Matrix.

qweight: [K, N / 8] int32 and qzeros: [G, N / 8] int32, both packed along the outputs, eight 4-bit codes to a word in
the order 0 2 4 6 1 3 5 7, lowest bits first; scales: [G, N] float16. w = scale × (code - zero).
Source: AutoAWQ's WQLinear_GEMM (github.com/casper-hansen/AutoAWQ).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from octavo.engine.quant.groups import of_codes
from octavo.engine.quant.scheme import AWQ
from octavo.kernels.matrix import Matrix

_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where in its word each of eight outputs is
_MIDDLE = 8


def matrix(form: AWQ, pieces: Mapping[str, torch.Tensor]) -> Matrix:
    """pieces: qweight, scales, and qzeros if the form has zero points. Raises ValueError."""
    zeros = _unpack(pieces["qzeros"]) if form.zero_point else _MIDDLE
    return of_codes(_unpack(pieces["qweight"]), 4, pieces["scales"].t(), zeros, form.group_size)


def _unpack(words: torch.Tensor) -> torch.Tensor:
    """words: [r, N / 8] int32 → [N, r] uint8."""
    shifts = 4 * torch.tensor(_PLACES, dtype=torch.int32).view(8, 1).to(words.device)
    return (words.t().contiguous().unsqueeze(1) >> shifts & 15).to(torch.uint8).flatten(0, 1)

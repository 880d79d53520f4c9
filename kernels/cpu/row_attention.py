"""Attention within rows by torch's fused kernel: rows of one length in one call. Contract: `octavo.kernels.ops`.

A call costs some 20 µs beyond its work, and a step of an encoder may hold hundreds of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F


def row_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: Sequence[int], scale: float
) -> torch.Tensor:
    """starts: query_start of the batch, on the host."""
    rows = list(pairwise(starts))
    out = torch.empty(query.shape, dtype=query.dtype)
    for length, first, count in _runs(rows):
        part = slice(first, first + length * count)
        shape = (count, length)
        q, k, v = (x[part].unflatten(0, shape).transpose(1, 2) for x in (query, key, value))
        grouped = query.shape[1] != key.shape[1]
        result = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
        out[part] = result.transpose(1, 2).flatten(0, 1)
    return out


def _runs(rows: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(length, first token, rows) of neighbouring rows that are equally long."""
    runs: list[tuple[int, int, int]] = []
    for start, end in rows:
        if runs and runs[-1][0] == end - start:
            length, first, count = runs[-1]
            runs[-1] = (length, first, count + 1)
        else:
            runs.append((end - start, start, 1))
    return runs

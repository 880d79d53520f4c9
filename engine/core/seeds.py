"""Seeds of sequences: one 64-bit key per sample of a request."""

from __future__ import annotations

_MASK = (1 << 64) - 1


def sequence_seed(request_seed: int, index: int) -> int:
    """The 64-bit key of sample `index` of a request. Index 0 keeps the request's own seed (SplitMix64 for the rest)."""
    if index == 0:
        return request_seed & _MASK
    z = (request_seed + index * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)

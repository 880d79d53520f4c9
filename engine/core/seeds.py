"""Seeds of sequences: one 64-bit key per sequence, from the request's seed and the sequence's place in the request.

Knows integers only. Ranks, replicas and clients that resubmit a request must get the same keys, so nothing here may
ever depend on the process or the machine.
"""

from __future__ import annotations

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def sequence_seed(request_seed: int, index: int) -> int:
    """The 64-bit key in [0, 2**64) of sequence `index` (0 … n-1) of a request.

    Index 0 keeps the request's own seed, so n = 1 and the first of n > 1 draw alike. The others are hashed, so that a
    request seeded 7 does not share a sequence with one seeded 8. `request_seed` may be any integer; its low 64 bits
    count.
    """
    if index < 0:
        raise ValueError(f"A sequence's index is at least 0, got {index}.")
    seed = request_seed & _MASK
    return seed if index == 0 else _mix(_mix(seed) ^ (index * _GOLDEN & _MASK))


def _mix(x: int) -> int:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64-bit integers."""
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)

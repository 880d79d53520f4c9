"""Counter-based random numbers: a draw is a function of (seed, position), with no state to keep, move or lose.

Philox-4x32-10 of Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Seeds and
positions are known on the host, so the numbers are made there, for all rows of a step at once, in numpy's 64-bit
integers.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLY = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_ROUNDS = 10


def philox4x32(counter: tuple[U64, U64, U64, U64], key: tuple[U64, U64]) -> tuple[U64, U64, U64, U64]:
    """Ten rounds. Every word: [N] uint64 holding a value below 2**32; so are the four words returned."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = _MULTIPLY[0] * c0, _MULTIPLY[1] * c2
        c0, c1, c2, c3 = (p1 >> _HALF) ^ c1 ^ k0, p1 & _LOW, (p0 >> _HALF) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def uniforms(seeds: U64, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """One number in the open interval (0, 1) per row, a multiple of 2**-53 (0 itself becomes 2**-54).

    seeds: [N] uint64, the key. positions: [N] int64, absolute position of the token being drawn, the counter.
    """
    place = positions.astype(np.uint64)
    zero = np.zeros_like(place)
    w0, w1, _, _ = philox4x32((place & _LOW, place >> _HALF, zero, zero), (seeds & _LOW, seeds >> _HALF))
    bits = ((w1 << _HALF) | w0) >> np.uint64(11)
    return np.maximum(bits.astype(np.float64), 0.5) * 2.0**-53

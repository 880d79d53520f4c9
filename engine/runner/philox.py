"""Counter-based random numbers: a draw is a function of (seed, position), with no state to keep, move or lose.

Philox-4x32-10 of Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Seeds and
positions are known on the host, so the numbers are made there, for all rows of a step at once, in numpy's 64-bit
integers; `Ahead` spreads the cost of numpy's calls over steps.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_ROUNDS = 10
_AHEAD = 32
# [2, 1] and [rounds, 2, 1]: both halves of the state are computed at once, since each call of numpy costs more than its
# work on a step's rows.
_MULTIPLY = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
_WEYL = np.array([[0x9E3779B9], [0xBB67AE85]], np.uint64) * np.arange(_ROUNDS, dtype=np.uint64)[:, None, None]


def philox4x32(counter: tuple[U64, U64, U64, U64], key: tuple[U64, U64]) -> tuple[U64, U64, U64, U64]:
    """Ten rounds. Every word: [N] uint64 holding a value below 2**32; so are the four words returned."""
    even, odd = np.stack(counter[::2]), np.stack(counter[1::2])
    for keys in (np.stack(key) + _WEYL) & _LOW:
        product = _MULTIPLY * even
        even, odd = (product >> _HALF)[::-1] ^ odd ^ keys, (product & _LOW)[::-1]
    return even[0], odd[0], even[1], odd[1]


def uniforms(seeds: U64, positions: Ints) -> Floats:
    """One number in the open interval (0, 1) per row, a multiple of 2**-53 (0 itself becomes 2**-54).

    seeds: [N] uint64, the key. positions: [N] int64, absolute position of the token being drawn, the counter.
    """
    place = positions.astype(np.uint64)
    zero = np.zeros_like(place)
    w0, w1, _, _ = philox4x32((place & _LOW, place >> _HALF, zero, zero), (seeds & _LOW, seeds >> _HALF))
    bits = ((w1 << _HALF) | w0) >> np.uint64(11)
    return np.maximum(bits.astype(np.float64), 0.5) * 2.0**-53


class Ahead:
    """The uniforms of every slot's next positions, made some steps ahead: a hundred calls of numpy cost as much for 32
    numbers as for one. A number is the same whenever it is made.
    """

    def __init__(self, num_slots: int) -> None:
        self._made = np.zeros((num_slots, _AHEAD))
        self._first = np.full(num_slots, -_AHEAD, np.int64)  # the position of a slot's first number; never this one

    def forget(self, slot: int) -> None:
        """The slot gets another seed."""
        self._first[slot] = -_AHEAD

    def take(self, slots: Ints, seeds: U64, positions: Ints) -> Floats:
        """uniforms(seeds, positions), [N] each; a slot's seed may only change after `forget`."""
        at = positions - self._first[slots]
        used_up = np.flatnonzero((at < 0) | (at >= _AHEAD))
        if len(used_up):
            fresh, begin = slots[used_up], positions[used_up]
            ahead = (begin[:, None] + np.arange(_AHEAD)).reshape(-1)
            self._made[fresh] = uniforms(np.repeat(seeds[used_up], _AHEAD), ahead).reshape(-1, _AHEAD)
            self._first[fresh] = begin
            at[used_up] = 0
        return self._made[slots, at]

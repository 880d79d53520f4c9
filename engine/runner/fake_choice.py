"""What the fake model draws where a mask leaves it a choice: something that reads as text, and that comes to an end.

Knows bytes as tokens (ByteTokenizer). Deterministic.
"""

from __future__ import annotations

from collections.abc import Collection

ENOUGH = 24  # tokens of an output, from which on it closes what is open and begins nothing new
_CLOSING = b'}]"n,:.<0123456789tf-'
_PRINTABLE = range(33, 127)


def choose(key: int, mask: bytes, plain: int, num_output: int, ends: Collection[int], never: Collection[int]) -> int:
    """A token that `mask` allows (see TokenMasks). plain: what would be drawn without a mask. ends: tokens that end the
    output. never: tokens that must not be drawn. -1 if none is left.
    """

    def allows(token: int) -> bool:
        return token >> 3 < len(mask) and bool(mask[token >> 3] >> (token & 7) & 1) and token not in never

    if not mask[:16].strip(b"\xff"):  # the first 128 tokens: free text
        return plain if allows(plain) else next(filter(allows, range(8 * len(mask))), -1)
    if num_output >= ENOUGH:
        in_string = allows(ord("q")) and allows(ord('"')) and not allows(ord("\n"))
        for token in (*ends, *(b'"' if in_string else _CLOSING)):
            if allows(token):
                return token
    if allows(plain):
        return plain
    left = [token for token in _PRINTABLE if allows(token)] or [t for t in range(8 * len(mask)) if allows(t)]
    return left[(key >> 11) % len(left)] if left else -1

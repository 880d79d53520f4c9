"""Names of KV blocks: the hash chain that the prefix cache, the router and every other tier agree on.

A full block is named by its tokens, the name of the block before it, and whatever else shapes its KV (salt; later media
and adapter), which enters at the root. Equal names mean equal KV. The hash is BLAKE2b with 128 bits: a collision would
serve one client another's KV, so a fast non-cryptographic hash will not do. Names are equal across processes and hosts.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

NAME_BYTES = 16


def root_name(salt: str | None = None) -> bytes:
    """The name that the first block's chain starts from."""
    return blake2b((salt or "").encode(), digest_size=NAME_BYTES, person=b"octavo-root").digest()


def next_name(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The name of a full block that holds `tokens` and follows the block named `parent`."""
    return blake2b(parent + array("I", tokens).tobytes(), digest_size=NAME_BYTES).digest()


class Chain:
    """The names of a prompt's full blocks, computed as far as somebody asks: who finds that nobody holds the next block
    never pays for those behind it. `tokens` must not change.
    """

    def __init__(self, tokens: Sequence[int], block_size: int, salt: str | None = None) -> None:
        self.block_size = block_size
        self.num_tokens = len(tokens)
        self._tokens = tokens
        self._salt = salt
        self._names: list[bytes] = []

    def __len__(self) -> int:
        return self.num_tokens // self.block_size

    def names(self, count: int) -> list[bytes]:
        """At least the first `count` names (at most len(self)), in order. Not a copy."""
        done = len(self._names)
        if count > done:
            parent = self._names[-1] if done else root_name(self._salt)
            fresh = array("I", self._tokens[done * self.block_size : count * self.block_size]).tobytes()
            step = len(fresh) // (count - done)
            for at in range(0, len(fresh), step):
                parent = blake2b(parent + fresh[at : at + step], digest_size=NAME_BYTES).digest()
                self._names.append(parent)
        return self._names

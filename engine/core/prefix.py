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

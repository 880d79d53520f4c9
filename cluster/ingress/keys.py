"""Keys: the API keys of which a client must send one. Knows no transport but the form `Bearer KEY`."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from octavo.cluster.ingress.errors import Unauthorized


class Keys:
    """`keys` empty: open to all."""

    def __init__(self, keys: Iterable[str]) -> None:
        # Digests: comparing them tells nothing about a key, not even its length.
        self._digests = tuple(_digest(key.encode()) for key in keys)

    def check(self, authorization: str) -> None:
        """`authorization`: what the client sent under this name, as latin-1. Raises Unauthorized."""
        if not self._digests:
            return
        scheme, _, token = authorization.partition(" ")
        digest = _digest(token.strip().encode("latin-1", "replace"))
        known = [hmac.compare_digest(digest, key) for key in self._digests]  # all of them, for constant time
        if scheme.lower() != "bearer" or not any(known):
            raise Unauthorized("A valid API key is needed: send it as 'Authorization: Bearer KEY'.")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()

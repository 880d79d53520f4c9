"""Keys: the API keys of which a client must send one. Knows no transport but the forms `Bearer KEY` and a bare key."""

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

    def check(self, authorization: str, api_key: str | None = None) -> None:
        """What the client sent under these names, as latin-1; one good key is enough. Raises Unauthorized."""
        if not self._digests:
            return
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() == "bearer" and self._knows(token.strip()):
            return
        if api_key is None or not self._knows(api_key.strip()):
            raise Unauthorized("A valid API key is needed: send it as 'Authorization: Bearer KEY' or 'X-Api-Key: KEY'.")

    def _knows(self, token: str) -> bool:
        digest = _digest(token.encode("latin-1", "replace"))
        known = [hmac.compare_digest(digest, key) for key in self._digests]  # all of them, for constant time
        return any(known)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()

"""Which vendor's form an error takes: OpenAI's, unless the request is one that Anthropic's clients make."""

from __future__ import annotations

from octavo.cluster.ingress.errors import Failure
from octavo.cluster.ingress.messages.errors import enveloped
from octavo.cluster.ingress.visit import Visit

_ANTHROPIC_PATHS = "/v1/messages"
_ANTHROPIC_HEADER = "anthropic-version"  # which its clients send to whatever path


def in_form(refused: Failure, path: str, visit: Visit) -> Failure:
    """`refused` as the client that asked for `path` reads it."""
    if path.startswith(_ANTHROPIC_PATHS) or _ANTHROPIC_HEADER in visit.headers:
        return enveloped(refused, visit.request_id)
    return refused

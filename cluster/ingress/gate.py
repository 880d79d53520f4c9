"""Gate: the outermost ASGI layer. What holds for every HTTP request whatever its path.

Gives it an id (X-Request-Id, taken from the client or drawn, sent back in any case), asks for the API key, bounds the
body, turns whatever exception comes out into OpenAI's error body, and writes one access log line. Knows no endpoint.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo.cluster.ingress import replies
from octavo.cluster.ingress.errors import TooLarge, Unauthorized, failure
from octavo.cluster.ingress.presence import ClientGone
from octavo.cluster.observability.access_log import AccessRecord, log_access

logger = logging.getLogger(__name__)

# As in vLLM: what probes and scrapers ask for needs no key.
OPEN_PATHS = frozenset({"/health", "/ready", "/ping", "/version", "/metrics"})
_REQUEST_ID = re.compile(r"[!-~]{1,128}")  # printable ASCII without blanks: fit for a header and a log line


@dataclass(slots=True)
class Visit:
    """One HTTP request on its way through; endpoints find it in `scope["octavo.visit"]` and fill in the record."""

    request_id: str
    arrival_time: float  # monotonic seconds
    headers: Headers = field(default_factory=Headers)
    record: AccessRecord = field(default_factory=AccessRecord)


class Gate:
    def __init__(self, app: ASGIApp, *, api_keys: Iterable[str], max_body_bytes: int) -> None:
        self._app = app
        # Digests: comparing them tells nothing about a key, not even its length.
        self._keys = tuple(_digest(key.encode()) for key in api_keys)
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        visit = Visit(given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex, time.monotonic(), headers)
        scope["octavo.visit"] = visit
        status = 0

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = visit.request_id
            await send(message)

        try:
            self._authorize(scope, headers)
            await self._app(scope, self._bounded(headers, receive), send_on)
        except (ClientGone, ClientDisconnect):
            visit.record.outcome = "client gone"
        except Exception as error:
            refused = failure(error)
            if refused.status >= 500:
                logger.error("request %s failed", visit.request_id, exc_info=error)
            if not status:
                body = replies.to_json(refused.body)
                reply = Response(body, refused.status, dict(refused.headers), "application/json")
                await reply(scope, receive, send_on)
            else:
                raise  # half an answer is out: closing the connection is all that is left to say
        finally:
            log_access(scope, visit.request_id, status, time.monotonic() - visit.arrival_time, visit.record)

    def _authorize(self, scope: Scope, headers: Headers) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        if not self._keys or path in OPEN_PATHS or scope["method"] == "OPTIONS":
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        digest = _digest(token.strip().encode("latin-1"))
        known = [hmac.compare_digest(digest, key) for key in self._keys]  # all of them, for constant time
        if scheme.lower() != "bearer" or not any(known):
            raise Unauthorized("A valid API key is needed: send it as 'Authorization: Bearer KEY'.")

    def _bounded(self, headers: Headers, receive: Receive) -> Receive:
        limit = self._max_body_bytes
        refusal = TooLarge(f"The request body is longer than the {limit} bytes allowed.")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > limit:
            raise refusal
        received = 0

        async def receive_bounded() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > limit:
                    raise refusal
            return message

        return receive_bounded


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()

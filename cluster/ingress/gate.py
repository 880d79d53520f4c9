"""Gate: the outermost ASGI layer. What holds for every HTTP request whatever its path.

Gives it an id (X-Request-Id, taken from the client or drawn, sent back in any case; as Request-Id too, the name that
Anthropic's clients know), asks for the API key, bounds the body, turns whatever exception comes out into the error body
that the client knows, and writes one access log line. Knows no endpoint.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo.cluster.ingress import replies
from octavo.cluster.ingress.errors import TooLarge, failure, log_failure
from octavo.cluster.ingress.forms import in_form
from octavo.cluster.ingress.keys import Keys
from octavo.cluster.ingress.presence import ClientGone
from octavo.cluster.ingress.visit import Visit, request_id
from octavo.cluster.observability.access_log import Access, log_access

logger = logging.getLogger(__name__)

# As in vLLM: what probes and scrapers ask for needs no key.
OPEN_PATHS = frozenset({"/health", "/ready", "/ping", "/version", "/metrics"})


class Gate:
    """Endpoints find the request's Visit in `scope["octavo.visit"]`."""

    def __init__(self, app: ASGIApp, *, api_keys: Iterable[str], max_body_bytes: int) -> None:
        self._app = app
        self._keys = Keys(api_keys)
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        visit = Visit(request_id(headers.get("x-request-id")), time.monotonic(), headers)
        scope["octavo.visit"] = visit
        status = 0

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                reply_headers = MutableHeaders(scope=message)
                reply_headers["x-request-id"] = reply_headers["request-id"] = visit.request_id
            await send(message)

        try:
            self._authorize(scope, headers)
            await self._app(scope, self._bounded(headers, receive), send_on)
        except (ClientGone, ClientDisconnect):
            visit.record.outcome = "client gone"
        except Exception as error:
            visit.trace.failed(error)
            refused = in_form(failure(error), _path(scope), visit)
            if refused.status >= 500:
                log_failure(logger, visit.request_id, error)
            if not status:
                body = replies.to_json(refused.body)
                reply = Response(body, refused.status, dict(refused.headers), "application/json")
                await reply(scope, receive, send_on)
            else:
                raise  # half an answer is out: closing the connection is all that is left to say
        finally:
            visit.trace.end(status or "-")
            client = scope.get("client")
            what = Access(scope["method"], scope["path"], client[0] if client else "-", status or "-", status < 400)
            log_access(what, visit.request_id, time.monotonic() - visit.arrival_time, visit.record)

    def _authorize(self, scope: Scope, headers: Headers) -> None:
        if _path(scope) not in OPEN_PATHS and scope["method"] != "OPTIONS":
            self._keys.check(headers.get("authorization", ""), headers.get("x-api-key"))

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


def _path(scope: Scope) -> str:
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    return path or "/"

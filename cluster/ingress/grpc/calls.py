"""Calls: what holds for every call whatever its method, as the gate does for HTTP.

Gives it an id, asks for the API key, bounds the request, turns whatever exception comes out into a status, and writes
one access log line. Knows Serve's context of a call, and no method.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import unquote

from google.protobuf.message import DecodeError
from grpc import StatusCode

from octavo.cluster.ingress.errors import TooLarge
from octavo.cluster.ingress.grpc.status import REQUEST_ID, rpc_failure
from octavo.cluster.ingress.grpc.window import Parcel, Window
from octavo.cluster.ingress.keys import Keys
from octavo.cluster.ingress.visit import Visit, request_id
from octavo.cluster.observability.access_log import Access, log_access
from octavo.engine.errors import RequestError

logger = logging.getLogger(__name__)


class Context(Protocol):
    """What is used of `ray.serve.grpc_util.RayServegRPCContext`. It has no deadline: a call whose deadline passes is
    cancelled like one whose client leaves.
    """

    def invocation_metadata(self) -> Iterable[tuple[str, str | bytes]]: ...

    def peer(self) -> str: ...

    def set_code(self, code: StatusCode) -> None: ...

    def set_details(self, details: str) -> None: ...

    def set_trailing_metadata(self, trailing_metadata: list[tuple[str, str]]) -> None: ...


@dataclass(frozen=True, slots=True)
class Method:
    """A method of a service: its path, and the classes of its messages."""

    path: str
    request: Any
    answer: Any


class Call:
    """One call. `failed`: it has ended with an error, which its context says."""

    def __init__(self, path: str, context: Context) -> None:
        self.path = path
        self.context = context
        headers = {name: value for name, value in context.invocation_metadata() if isinstance(value, str)}
        given = headers.get(REQUEST_ID) or headers.get("request_id")  # the latter is Serve's name for it
        self.visit = Visit(request_id(given), time.monotonic(), headers)
        self.failed = False
        # Serve sends these with the first message already, or with none but the last: it depends on its proxy.
        context.set_trailing_metadata([(REQUEST_ID, self.visit.request_id)])

    @contextmanager
    def answering(self) -> Iterator[None]:
        """No exception but a cancellation comes out of it."""
        code = StatusCode.OK
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            code = StatusCode.CANCELLED
            raise
        except Exception as error:
            self.visit.trace.failed(error)
            refused = rpc_failure(error)
            code, self.failed = refused.code, True
            if code in (StatusCode.INTERNAL, StatusCode.UNAVAILABLE):
                logger.error("request %s failed", self.visit.request_id, exc_info=error)
            self.context.set_code(code)
            self.context.set_details(refused.details)
            self.context.set_trailing_metadata([(REQUEST_ID, self.visit.request_id), *refused.metadata])
        finally:
            self.visit.trace.end(code.name)
            what = Access("gRPC", self.path, _client(self.context.peer()), code.name, code == StatusCode.OK)
            log_access(what, self.visit.request_id, time.monotonic() - self.visit.arrival_time, self.visit.record)


class Calls:
    """`through_handle`: whether what comes now came by one of Serve's proxies and a handle: see `stream`."""

    def __init__(self, keys: Keys, max_request_bytes: int, through_handle: Callable[[], bool]) -> None:
        self._keys = keys
        self._max_request_bytes = max_request_bytes
        self._through_handle = through_handle

    async def unary(
        self, method: Method, request: bytes, context: Context, work: Callable[[Any, Visit], Awaitable[Any]]
    ) -> Any:
        """What `work` returns; beside an error, an empty message."""
        call = Call(method.path, context)
        answer = method.answer()
        with call.answering():
            answer = await work(self._parsed(method, request, call.visit), call.visit)
        return answer

    async def stream(
        self,
        method: Method,
        request: bytes,
        context: Context,
        work: Callable[[Any, Visit, Window], AsyncGenerator[Any, None]],
    ) -> AsyncGenerator[Parcel, None]:
        """What `work` yields."""
        call, window = Call(method.path, context), Window()
        with call.answering():
            async with aclosing(work(self._parsed(method, request, call.visit), call.visit, window)) as messages:
                async for message in messages:
                    yield window.parcel(message)
        if call.failed and self._through_handle():
            # Serve's proxies hear of a status with a message only, and would say that all went well.
            yield window.parcel(method.answer())

    def _parsed(self, method: Method, request: bytes, visit: Visit) -> Any:
        self._keys.check(visit.headers.get("authorization", ""))
        if len(request) > self._max_request_bytes:
            raise TooLarge(f"The request is longer than the {self._max_request_bytes} bytes allowed.")
        try:
            return method.request.FromString(request)
        except DecodeError:
            raise RequestError(f"The request is no {method.request.DESCRIPTOR.full_name}.") from None


def _client(peer: str) -> str:
    """`ipv4:127.0.0.1:1234` → `127.0.0.1`. Behind a proxy it is the proxy's."""
    return unquote(peer.partition(":")[2].rpartition(":")[0]).strip("[]") or "-"

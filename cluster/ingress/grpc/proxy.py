"""Serve's Python proxy and streams that a client leaves.

Serve 2.60's gRPC proxy cancels a request where it waits for the request's next message. A client that leaves while a
message is on its way out is not noticed there: the proxy logs an unexpected error, and the request runs to its end for
nobody. Here such a stream is led to the place where Serve cancels. Behind HAProxy none of this is needed, nor done.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

Stream = Callable[[Any, Any], AsyncGenerator[bytes, None]]

_leaving: set[asyncio.Task[None]] = set()  # asyncio itself keeps only weak references


@contextlib.contextmanager
def leaving_noticed(server: Any) -> Iterator[None]:
    """Streams whose handlers are added to `server`, one of Serve's, while inside end with their clients."""
    factory = getattr(server, "service_handler_factory", None)
    if not hasattr(getattr(factory, "__self__", None), "proxy_request"):  # no proxy's server
        yield
        return
    assert factory is not None

    def made(service_method: str, streaming_type: Any) -> Any:
        handler = factory(service_method=service_method, streaming_type=streaming_type)
        return noticing(handler) if streaming_type == "unary_stream" else handler

    server.service_handler_factory = made
    try:
        yield
    finally:
        server.service_handler_factory = factory


def noticing(handler: Stream) -> Stream:
    async def stream(request: Any, context: Any) -> AsyncGenerator[bytes, None]:
        kept = _KeptContext(context)
        messages = handler(request, kept)
        try:
            async for message in messages:
                yield message
        except GeneratorExit:
            kept.gone = True
            task = asyncio.get_running_loop().create_task(cancel_where_it_waits(messages))
            _leaving.add(task)
            task.add_done_callback(_leaving.discard)
            raise

    return stream


class _KeptContext:
    """gRPC's context of a call, for as long as there is a call: touching it later has ended processes (SIGSEGV)."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self.gone = False

    def __getattr__(self, name: str) -> Any:
        if self.gone:
            return lambda *args, **kwargs: None
        return getattr(self._context, name)


async def cancel_where_it_waits(messages: AsyncGenerator[bytes, None]) -> None:
    """Messages that are there already are dropped."""
    while True:
        following = asyncio.ensure_future(anext(messages))
        await asyncio.sleep(0)  # it runs until it has to wait
        following.cancel()
        try:
            await following
        except (asyncio.CancelledError, StopAsyncIteration):
            return

"""Answers: a generation as the HTTP response to the client, whole or as server-sent events.

Knows HTTP, time limits and clients that leave. What the bodies look like is a Dialect's business.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, Protocol

from starlette.background import BackgroundTask
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octavo.cluster.ingress import replies
from octavo.cluster.ingress.errors import Failure, failure, log_failure
from octavo.cluster.ingress.generation import Generation, Piece
from octavo.cluster.ingress.presence import ClientGone, stay
from octavo.cluster.ingress.visit import Places, Visit

logger = logging.getLogger(__name__)

# A client that does not take what is written to it for so long is cut off. Twice that, at the worst.
STALL_S = 150.0
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # tells nginx not to collect events
]


class Dialect(Protocol):
    """One endpoint's shapes. Made for one request; `chunks` is called with its pieces in order, `whole` once."""

    @property
    def form(self) -> replies.EventForm:
        """How a stream's events are written."""
        ...

    def opening(self) -> Iterable[dict[str, Any]]:
        """What a stream sends before any token."""
        ...

    def chunks(self, piece: Piece) -> Iterable[dict[str, Any]]: ...

    def closing(self, usage: dict[str, Any]) -> Iterable[dict[str, Any]]:
        """What a stream sends after the last piece."""
        ...

    def failed(self, failure: Failure) -> Iterable[dict[str, Any]]:
        """What it sends instead where something went wrong after it had begun."""
        ...

    def whole(self, pieces: Sequence[Sequence[Piece]], usage: dict[str, Any]) -> dict[str, Any]:
        """`pieces[i]` are those of choice i, in order."""
        ...


class _Answer(Response):
    """A response that does its work when it is sent: then it knows of the client's leaving.

    Errors before the first byte are raised, for the gate to answer.
    """

    def __init__(
        self, generation: Generation, dialect: Dialect, visit: Visit, places: Places, timeout_s: float | None
    ) -> None:
        self.generation = generation
        self.dialect = dialect
        self.visit = visit
        self.places = places
        self.timeout_s = timeout_s
        self.background: BackgroundTask | None = None

    @asynccontextmanager
    async def limits(self, receive: Receive) -> AsyncIterator[None]:
        """The client is there and time is left; else ClientGone or TimedOut."""
        async with self.visit.time_limit(self.timeout_s), stay(receive):
            yield


class WholeAnswer(_Answer):
    """One JSON body when all is done."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        parts: list[list[Piece]] = [[] for _ in self.generation.choices]
        with self.places.taken(), self.visit.recorded(self.generation):
            async with self.limits(receive), aclosing(self.generation.pieces()) as pieces:
                async for piece in pieces:
                    parts[piece.index].append(piece)
        body = self.dialect.whole(parts, self.generation.usage())
        await Response(replies.to_json(body), media_type="application/json")(scope, receive, send)


class StreamedAnswer(_Answer):
    """Server-sent events, for each piece as it comes.

    The status line waits for the first piece (for `early_errors_s` at most), so that a request the engine refuses gets
    its 4xx. Later errors are an event of their own. While a slow client does not read, tokens pile up in the mailbox,
    where they merge.
    """

    def __init__(
        self,
        generation: Generation,
        dialect: Dialect,
        visit: Visit,
        places: Places,
        timeout_s: float | None,
        *,
        early_errors_s: float,
    ) -> None:
        super().__init__(generation, dialect, visit, places, timeout_s)
        self.early_errors_s = early_errors_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stream = _Stream(send, [*map(self.dialect.form.event, self.dialect.opening())])
        async with stream.attended(self.early_errors_s):
            await self._run(stream, receive)

    async def _run(self, stream: _Stream, receive: Receive) -> None:
        dialect, write = self.dialect, self.dialect.form.event
        try:
            with self.places.taken(), self.visit.recorded(self.generation):
                async with self.limits(receive), aclosing(self.generation.pieces()) as pieces:
                    async for piece in pieces:
                        await stream.send([*map(write, dialect.chunks(piece))])
        except Exception as error:
            if not stream.opened or isinstance(error, ClientGone):
                raise
            refused = failure(error)
            if refused.status >= 500:
                log_failure(logger, self.visit.request_id, error)
            await stream.end([*map(write, dialect.failed(refused)), dialect.form.end])
        else:
            await stream.end([*map(write, dialect.closing(self.generation.usage())), dialect.form.end])


class _Stream:
    """The sending side of an event stream, begun by whoever is first: a piece, or a timer."""

    def __init__(self, send: Send, opening: Sequence[bytes]) -> None:
        self.opened = False
        self._is_under_way = False  # the beginning has been sent, too
        self._send = send
        self._opening = opening
        self._lock = asyncio.Lock()
        self._num_begun = self._num_done = 0  # writes
        self._has_stalled = False

    @asynccontextmanager
    async def attended(self, open_after_s: float) -> AsyncIterator[None]:
        """The stream is opened after so long if nobody has, and left with ClientGone if its client stops reading."""
        task = asyncio.current_task()
        assert task is not None
        attendant = asyncio.create_task(self._attend(open_after_s, task))
        try:
            yield
        except asyncio.CancelledError:
            if not self._has_stalled:
                raise
            task.uncancel()
            raise ClientGone from None
        finally:
            attendant.cancel()

    async def _attend(self, open_after_s: float, task: asyncio.Task[Any]) -> None:
        await asyncio.sleep(open_after_s)
        await self._open()
        writing, before = 0, -1  # the number of the write under way, 0 = none
        while not writing or writing != before:
            await asyncio.sleep(STALL_S)
            writing, before = self._num_begun if self._num_begun > self._num_done else 0, writing
        self._has_stalled = True
        task.cancel()

    async def send(self, events: Sequence[bytes]) -> None:
        if not self._is_under_way:
            await self._open()
        if events:
            await self._write(events, more=True)

    async def end(self, events: Sequence[bytes]) -> None:
        """The last events."""
        await self._open()
        await self._write(events, more=False)

    async def _write(self, events: Sequence[bytes], more: bool) -> None:
        self._num_begun += 1
        await self._send({"type": "http.response.body", "body": b"".join(events), "more_body": more})
        self._num_done += 1

    async def _open(self) -> None:
        async with self._lock:
            if self.opened:
                return
            self.opened = True
            await self._send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
            await self._send({"type": "http.response.body", "body": b"".join(self._opening), "more_body": True})
            self._is_under_way = True

"""EngineClient: all that the HTTP side knows of the engines behind it.

Tokens go in, token deltas come out. Knows nothing of HTTP, text or Ray. The cluster implements the protocol over Serve
and the side channel; `LocalEngineClient` implements it over one engine in this process.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from octavo.cluster.observability.traces import NO_JOURNEY, Journey
from octavo.engine.errors import OctavoError, RequestError
from octavo.engine.types import EngineInfo, EngineStats, Request, TokenDelta

LOCAL = "0"  # what an engine in this process is called where replicas have ids


class ReplicaLost(OctavoError):
    """The replica that served the request is gone and no other could take the request over (HTTP 503)."""


class HandedOver(ReplicaLost):
    """The replica is well but has to stop: what is left of the request is another one's."""


class EngineClient(Protocol):
    """One or many replicas, as the ingress sees them. All methods run on the ingress's event loop."""

    async def info(self) -> EngineInfo:
        """What the engines are. All replicas are equal. Raises ReplicaLost if none is there."""
        ...

    def generate(self, request: Request, journey: Journey = NO_JOURNEY) -> AsyncGenerator[TokenDelta, None]:
        """The deltas of a request; ends after each of its n sequences has had its finish reason. `journey` is told how
        it gets on.

        Closing the iterator (`aclose`, or cancelling the task that waits on it) aborts what is unfinished. Raises
        RequestError, CapacityError or ReplicaLost, the first two before the first delta only.
        """
        ...

    async def stats(self) -> Mapping[str, EngineStats]:
        """A snapshot of each replica, by its id."""
        ...


class EngineLoop(Protocol):
    """What a client needs of `octavo.engine.loop.EngineLoop`. All methods are thread-safe and return at once."""

    def submit(self, request: Request) -> None: ...

    def abort(self, request_id: str) -> None: ...

    def stats(self) -> EngineStats: ...


class Mailbox:
    """The deltas of one request between who receives them and who sends them on. Not thread-safe: one event loop.

    A reader that falls behind finds what has piled up merged into one delta per sequence, so a slow client costs the
    memory of its tokens and nobody's time.
    """

    def __init__(self) -> None:
        self._pending: dict[int, deque[TokenDelta]] = {}
        self._error: BaseException | None = None
        self._ready = asyncio.Event()

    def put(self, delta: TokenDelta) -> None:
        self._pending.setdefault(delta.index, deque()).append(delta)
        self._ready.set()

    def fail(self, error: BaseException) -> None:
        """`take` raises `error` once all that was put before it is taken."""
        self._error = error
        self._ready.set()

    async def take(self) -> TokenDelta:
        """All pending deltas of one sequence as one, oldest sequence first; waits for one."""
        while not self._pending:
            if self._error is not None:
                raise self._error
            self._ready.clear()
            await self._ready.wait()
        index = next(iter(self._pending))
        return merge(self._pending.pop(index))


def merge(deltas: Sequence[TokenDelta]) -> TokenDelta:
    """Successive deltas of one sequence as one. At least one delta."""
    first, last = deltas[0], deltas[-1]
    if len(deltas) == 1:
        return first
    return replace(  # of the last one, what is not said here: how it ended, and whatever else comes with an end
        last,
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        logprobs=tuple(entry for delta in deltas for entry in delta.logprobs),
        num_cached_tokens=max(delta.num_cached_tokens for delta in deltas),
        prompt_logprobs=first.prompt_logprobs,
        times=first.times,
    )


class LocalEngineClient:
    """EngineClient over an engine in this process.

    `start` gets the callback for the engine's deltas and returns the started loop that calls it, once per step, on the
    engine's thread. The event loop is woken once per step. Who starts the loop stops it.
    """

    def __init__(self, info: EngineInfo, start: Callable[[Callable[[list[TokenDelta]], None]], EngineLoop]) -> None:
        self._info = info
        self._mailboxes: dict[str, Mailbox] = {}
        self._aio: asyncio.AbstractEventLoop | None = None
        self._loop = start(self.on_deltas)

    async def info(self) -> EngineInfo:
        return self._info

    async def stats(self) -> Mapping[str, EngineStats]:
        return {LOCAL: self._loop.stats()}

    async def generate(self, request: Request, journey: Journey = NO_JOURNEY) -> AsyncGenerator[TokenDelta, None]:
        if request.request_id in self._mailboxes:
            raise RequestError(f"A request with the id {request.request_id!r} is running already.", "request_id")
        self._aio = asyncio.get_running_loop()
        mailbox = self._mailboxes[request.request_id] = Mailbox()
        submitted, unfinished = False, len(request.sequences)
        journey.submitted()
        try:
            self._loop.submit(request)
            submitted = True
            journey.accepted(LOCAL)
            while unfinished:
                delta = await mailbox.take()
                if delta.times is not None:
                    journey.began(delta.times)
                unfinished -= delta.finish_reason is not None
                yield delta
        finally:
            del self._mailboxes[request.request_id]
            if submitted and unfinished:
                self._loop.abort(request.request_id)

    def on_deltas(self, deltas: list[TokenDelta]) -> None:
        """Called on the engine's thread, once per step."""
        aio = self._aio
        if aio is None or aio.is_closed():
            return  # nobody has asked for anything, or the server is gone
        aio.call_soon_threadsafe(self._deliver, deltas)

    def _deliver(self, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            mailbox = self._mailboxes.get(delta.request_id)
            if mailbox is not None:  # else aborted meanwhile
                mailbox.put(delta)

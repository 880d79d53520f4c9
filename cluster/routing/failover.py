"""FailoverClient: an EngineClient whose requests outlive the replicas that serve them.

Keeps each sequence's tokens so far. When a replica is lost, what is left of its requests is submitted again, prompt and
tokens so far, and whoever takes it goes on: draws are keyed by position (see Request.resume), so the reader sees one
stream, with a pause in it. Each attempt reads from an inbox of its own, so nothing of an old one can reach a new one.

Knows no transport and no replica but by the name an attempt gives it. Lives on one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Protocol

from octavo.cluster.ingress.client import HandedOver, ReplicaLost
from octavo.cluster.observability.traces import NO_JOURNEY, Journey
from octavo.engine.errors import CapacityError, OctavoError
from octavo.engine.types import EngineInfo, EngineStats, Request, Resumed, TokenDelta

logger = logging.getLogger(__name__)

# A request under which so many replicas were lost in a row is taken to be the cause, unless it got on well in between:
# by at least GOT_ON_TOKENS tokens.
POISON_LOSSES = 3
GOT_ON_TOKENS = 32
FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 2.0


class Attempts(Protocol):
    """What is tried again: `octavo.cluster.routing.client.ServeEngineClient`."""

    async def info(self) -> EngineInfo: ...

    async def stats(self) -> Mapping[str, EngineStats]: ...

    def attempt(
        self,
        request: Request,
        accepted: Callable[[str], None],
        within_s: float | None = None,
        avoid: Collection[str] = (),
    ) -> AsyncGenerator[TokenDelta, None]: ...


class FailoverClient:
    """`timeout_s`: how long a request may be without a replica before it is given up. Its own deadline is the caller's
    to keep: closing `generate` ends the request, wherever it is.

    `resumed` is called each time a request is submitted again after a loss. `is_hopeless`: whether no replica will come
    any more, so that waiting for one would only keep the client in the dark.
    """

    def __init__(
        self,
        client: Attempts,
        timeout_s: float,
        resumed: Callable[[], None] = lambda: None,
        is_hopeless: Callable[[], bool] = lambda: False,
    ) -> None:
        self._client = client
        self._timeout_s = timeout_s
        self._resumed = resumed
        self._is_hopeless = is_hopeless

    async def info(self) -> EngineInfo:
        """As `EngineClient`; a replica that dies while it is asked is no reason to fail: another one is asked."""
        for _ in range(POISON_LOSSES):
            try:
                return await self._client.info()
            except ReplicaLost:
                await asyncio.sleep(FIRST_PAUSE_S)
        return await self._client.info()

    async def stats(self) -> Mapping[str, EngineStats]:
        return await self._client.stats()

    async def generate(self, request: Request, journey: Journey = NO_JOURNEY) -> AsyncGenerator[TokenDelta, None]:
        """See EngineClient. Raises ReplicaLost when no replica was there in time, or too many were lost under it."""
        progress, search = _Progress(request), _Search(self._timeout_s, journey)
        while True:
            search.begin()
            try:
                attempt = self._client.attempt(progress.rest(), search.accepted, search.left_s, search.avoid)
                async with aclosing(attempt) as deltas:
                    async for delta in deltas:
                        search.brought(delta)
                        yield progress.take(delta)
                        if progress.is_complete:
                            return
                raise ReplicaLost("The replica ended the request early.")
            except ReplicaLost as error:
                search.lost(error)
                if self._is_hopeless():
                    raise ReplicaLost(f"The server is stopping and has no replica left: {error}") from error
                self._resumed()
                logger.warning(
                    "request %s goes on elsewhere behind %d tokens: %s", request.request_id, progress.num_tokens, error
                )
            except CapacityError as error:
                if not search.is_on:
                    raise  # nobody has begun it: the client may be told to come back later
                journey.lost(error)
            await search.pause()


class _Progress:
    """What a request's reader has got."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._tokens = {wanted.index: list(wanted.token_ids) for wanted in request.sequences}  # of those unfinished
        self._num_cached: dict[int, int] = {}

    @property
    def is_complete(self) -> bool:
        return not self._tokens

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self._tokens.values()))

    def take(self, delta: TokenDelta) -> TokenDelta:
        """Count `delta` as delivered; returns it as the reader is to see it."""
        self._tokens[delta.index] += delta.token_ids
        if delta.finish_reason is not None:
            del self._tokens[delta.index]
        # What was cached where the request began is what the client is told, and billed.
        num_cached = self._num_cached.setdefault(delta.index, delta.num_cached_tokens)
        return delta if num_cached == delta.num_cached_tokens else replace(delta, num_cached_tokens=num_cached)

    def rest(self) -> Request:
        """What is still to be computed."""
        if self._tokens.keys() == {w.index for w in self._request.sequences} and not self.num_tokens:
            return self._request
        return replace(self._request, resume=tuple(Resumed(i, tuple(tokens)) for i, tokens in self._tokens.items()))


class _Search:
    """A request's way from replica to replica: how long it has been without one, and how many it has lost."""

    def __init__(self, timeout_s: float, journey: Journey) -> None:
        self._timeout_s = timeout_s
        self._journey = journey
        self._without_since: float | None = None
        self.avoid: set[str] = set()  # replicas lost with it
        self._replica: str | None = None
        self._num_brought = 0
        self._losses = 0
        self._pauses = 0

    @property
    def is_on(self) -> bool:
        """Whether the request is without a replica that it had, or tried to get in vain."""
        return self._without_since is not None

    @property
    def left_s(self) -> float | None:
        """Seconds until it is given up; None: the first replica may be waited for as long as the client waits."""
        if self._without_since is None:
            return None
        return self._without_since + self._timeout_s - time.monotonic()

    def begin(self) -> None:
        self._replica, self._num_brought = None, 0
        self._journey.submitted()

    def accepted(self, replica: str) -> None:
        self._replica, self._without_since, self._pauses = replica, None, 0
        self._journey.accepted(replica)

    def brought(self, delta: TokenDelta) -> None:
        self._num_brought += len(delta.token_ids)
        if delta.times is not None:
            self._journey.began(delta.times)

    def lost(self, error: ReplicaLost) -> None:
        """The attempt ended with `error`. Raises ReplicaLost if there is to be no other."""
        self._journey.lost(error)
        if self._replica is not None:
            self.avoid.add(self._replica)
        if self._replica is not None and not isinstance(error, HandedOver):
            self._losses = 1 if self._num_brought >= GOT_ON_TOKENS else self._losses + 1
            if self._losses >= POISON_LOSSES:
                raise ReplicaLost(
                    f"{self._losses} replicas in a row were lost while they served this request, so it is not tried "
                    f"again; the last time: {error}"
                ) from error
        if self._without_since is None:
            self._without_since = time.monotonic()
        self._raise_if_over(error)

    async def pause(self) -> None:
        """Before the next attempt: not at all after a loss, then longer and longer, each time by chance."""
        if self._pauses:
            longest = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**self._pauses)
            await asyncio.sleep(random.uniform(longest / 2, longest))
        self._pauses += 1
        self._raise_if_over(None)

    def _raise_if_over(self, error: OctavoError | None) -> None:
        left_s = self.left_s
        if left_s is not None and left_s <= 0:
            raise ReplicaLost(
                f"The request has lost its replica, and for {self._timeout_s:g} s no other has taken it over."
            ) from error

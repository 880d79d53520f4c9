"""PooledAnswer: a batch as the HTTP response to the client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from starlette.background import BackgroundTask
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octavo.cluster.ingress import replies
from octavo.cluster.ingress.pooling.batch import Batch
from octavo.cluster.ingress.presence import stay
from octavo.cluster.ingress.visit import Places, Visit

# Numbers written as JSON in one go; more are written on a thread.
WRITE_IN_THREAD_BYTES = 1 << 16


class PooledAnswer(Response):
    """Does its work when it is sent: then it knows of the client's leaving. shape: vectors → the body."""

    def __init__(
        self,
        batch: Batch,
        shape: Callable[[Sequence[bytes]], dict[str, Any]],
        visit: Visit,
        places: Places,
        timeout_s: float | None,
    ) -> None:
        self.batch, self.shape, self.visit, self.places, self.timeout_s = batch, shape, visit, places, timeout_s
        self.background: BackgroundTask | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.places.taken(), self.visit.recorded(self.batch):
            async with self.visit.time_limit(self.timeout_s), stay(receive):
                vectors = await self.batch.run()

        def write() -> bytes:
            return replies.to_json(self.shape(vectors))

        size = sum(map(len, vectors))
        body = write() if size <= WRITE_IN_THREAD_BYTES else await asyncio.to_thread(write)
        await Response(body, media_type="application/json")(scope, receive, send)

"""Watch: keeps a Fleet informed. Subscribes with every replica there is, and passes on what they send.

Knows the side channel's batches and the control call `subscribe`, given as a function. Does not know Serve or policies.
Everything runs on the ingress's event loop, but for `replicas_changed`, which any thread may call.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from octavo.cluster import wire
from octavo.cluster.routing.fleet import Fleet

logger = logging.getLogger(__name__)

SUBSCRIBE_S = 10.0
RETRY_S = (0.1, 0.3, 1.0, 2.0)
CHECK_S = 1.0
TIDY_STEP_S = 0.002


class Watch:
    """`subscribe(replica)`: ask the replica to send what becomes of it, beginning with all there is."""

    def __init__(self, fleet: Fleet, subscribe: Callable[[str], Awaitable[None]]) -> None:
        self._fleet = fleet
        self._subscribe = subscribe
        self._aio = asyncio.get_running_loop()
        self._next: dict[str, int] = {}  # replica → the sequence of its next block changes; without: not in step
        self._subscribing: dict[str, asyncio.Task[None]] = {}
        self._upkeep = asyncio.create_task(self._keep_up(), name="fleet-upkeep")
        self._is_closed = False

    def replicas_changed(self, replicas: Mapping[str, bool]) -> None:
        """The replicas there are, and whether each is on this node. Decisions take it into account at once."""
        self._fleet.set_replicas(replicas)
        if not self._aio.is_closed():
            self._aio.call_soon_threadsafe(self._subscribe_with_new)

    def on_batch(self, replica: str, batch: Any) -> None:
        """A TokenBatch of a replica, maybe of another model."""
        if replica not in self._fleet.replicas:
            return
        if batch.HasField("stats"):
            self._fleet.observe(replica, wire.stats_from_proto(batch.stats), time.monotonic() - batch.stats_age_s)
        for changes in batch.blocks:
            if changes.cleared:
                self._next[replica] = changes.sequence
            if self._next.get(replica) == changes.sequence:
                self._fleet.change(replica, wire.changes_from_proto(changes))
                self._next[replica] += 1
            elif self._next.pop(replica, None) is not None:
                logger.warning("block changes of replica %s are missing: asking for all of them", replica)
                self._start_subscribing(replica)

    def on_lost(self, replica: str) -> None:
        """The replica's channel is gone."""
        self._next.pop(replica, None)
        self._fleet.lose(replica)
        if replica in self._fleet.replicas:
            self._start_subscribing(replica)

    async def close(self) -> None:
        """Ask no replica any more. To be called before an ingress ends: a call of a process that dies meanwhile holds
        up those of others at that replica, for up to 2 s (Ray 2.60).
        """
        self._is_closed = True
        tasks = [self._upkeep, *self._subscribing.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _subscribe_with_new(self) -> None:
        here = set(self._fleet.replicas)
        for gone in self._next.keys() - here:
            del self._next[gone]
        for gone in self._subscribing.keys() - here:
            self._subscribing.pop(gone).cancel()
        for replica in here - self._next.keys() - self._subscribing.keys():
            self._start_subscribing(replica)

    def _start_subscribing(self, replica: str) -> None:
        standing = self._subscribing.get(replica)
        if not self._is_closed and (standing is None or standing.done()):
            self._subscribing[replica] = asyncio.create_task(self._keep_subscribing(replica))

    async def _keep_subscribing(self, replica: str) -> None:
        """Until the replica has agreed, or is gone."""
        attempt = 0
        try:
            while replica in self._fleet.replicas:
                try:
                    async with asyncio.timeout(SUBSCRIBE_S):
                        await self._subscribe(replica)
                    return
                except Exception as error:
                    logger.info("replica %s cannot be subscribed with yet: %r", replica, error)
                    await asyncio.sleep(RETRY_S[min(attempt, len(RETRY_S) - 1)])
                    attempt += 1
        finally:
            if self._subscribing.get(replica) is asyncio.current_task():
                del self._subscribing[replica]

    async def _keep_up(self) -> None:
        while True:
            await asyncio.sleep(CHECK_S)
            self._fleet.check_ages(time.monotonic())
            for _ in self._fleet.tidy():
                await asyncio.sleep(TIDY_STEP_S)

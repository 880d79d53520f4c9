"""Publisher: what a replica tells the ingresses that asked for it: its load and what becomes of its KV blocks.

Knows the block pool's log and the token channels. Does not know requests. Everything here runs on the replica's event
loop; the pool belongs to the engine's thread, and only what it lets any thread do is done here.

Changes leave with the next batch of tokens, or after TICK_S at the latest. An ingress first gets the names of all
blocks there are, in chunks between which tokens go out. Chunks and changes may overlap without harm: a chunk holds only
what is findable at the moment it is written, and changes repeated on top of it lead to the same end.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from octavo.cluster.token_sender import TokenChannel
from octavo.engine.core.blocks import BlockChanges, BlockLog, BlockPool
from octavo.engine.types import EngineStats

logger = logging.getLogger(__name__)

TICK_S = 0.05
IDLE_S = 1.0  # stats are sent at least so often
CHUNK = 4096  # names in one message of a snapshot


class Publisher:
    """`stats`: a snapshot of the engine."""

    def __init__(self, pool: BlockPool, stats: Callable[[], EngineStats]) -> None:
        self._pool = pool
        self._stats = stats
        self._channels: set[TokenChannel] = set()
        self._snapshots: dict[TokenChannel, asyncio.Task[None]] = {}
        self._ticking: asyncio.Task[None] | None = None

    def subscribe(self, channel: TokenChannel) -> None:
        """Tell `channel`'s ingress everything from now on; once more from the start, if it hears already."""
        if self._pool.log is None:
            self._pool.log = BlockLog()
        self._channels.add(channel)
        self._start_snapshot(channel)
        if self._ticking is None or self._ticking.done():
            self._ticking = asyncio.create_task(self._tick(), name="publisher")

    def gather(self) -> None:
        """Put what has changed into the channels' next batches. To be called once per step."""
        log = self._pool.log
        if log is None:
            return
        changes = log.drain()
        if changes.lost:
            logger.warning("more blocks changed than the log holds: all ingresses get a new snapshot")
            for channel in self._channels:
                self._start_snapshot(channel)
        elif changes:
            for channel in self._channels:
                channel.note(changes)

    async def close(self) -> None:
        tasks = [*self._snapshots.values(), *([self._ticking] if self._ticking else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._channels = {channel for channel in self._channels if not channel.ended}
            if not self._channels:
                self._pool.log = None  # nobody listens: the pool need not record
                return
            self.gather()
            stats, now = self._stats(), time.monotonic()
            for channel in self._channels:
                if channel.has_notes or now - channel.stats_at > IDLE_S or _load(channel.stats) != _load(stats):
                    channel.flush(stats)

    def _start_snapshot(self, channel: TokenChannel) -> None:
        running = self._snapshots.get(channel)
        if running is not None:
            running.cancel()
        task = asyncio.create_task(self._send_snapshot(channel))
        self._snapshots[channel] = task
        task.add_done_callback(lambda done: self._forget_snapshot(channel, done))

    def _forget_snapshot(self, channel: TokenChannel, task: asyncio.Task[None]) -> None:
        if self._snapshots.get(channel) is task:
            del self._snapshots[channel]

    async def _send_snapshot(self, channel: TokenChannel) -> None:
        names = self._pool.names()
        channel.note(BlockChanges(cleared=True))
        await channel.flush(self._stats())
        for start in range(0, len(names), CHUNK):
            here = [name for name in names[start : start + CHUNK] if self._pool.find(name) is not None]
            channel.note(BlockChanges(stored=tuple(here)))
            await channel.flush(self._stats())


def _load(stats: EngineStats | None) -> tuple[int, int, int] | None:
    return None if stats is None else (stats.steps, stats.num_running, stats.num_waiting)

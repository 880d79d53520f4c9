"""TokenSender: the replica's half of the side channel. One long-lived gRPC call per ingress, formed on demand.

Knows gRPC and protobuf messages. Does not know Serve or the engine. Everything here runs on one event loop.

What bounds it: one batch per channel is being written, and what arrives meanwhile waits to become the next one. So a
channel holds at most the tokens of its live requests, and that for at most STALL_S: an ingress that takes nothing for
so long counts as gone, and its requests are aborted.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from octavo.cluster import wire
from octavo.cluster.ingress.client import ReplicaLost
from octavo.cluster.token_receiver import KEEPALIVE, UNLIMITED_MESSAGES
from octavo.cluster.wire import IngressAddress
from octavo.engine.core.blocks import BlockChanges
from octavo.engine.types import EngineStats
from octavo.protos.octavo.v1 import tokens_pb2, tokens_pb2_grpc

logger = logging.getLogger(__name__)

CONNECT_S = 5.0
STALL_S = 30.0
CLOSE_S = 5.0


class TokenChannel:
    """The call to one ingress. `on_end` is called once, however a call that once stood ends."""

    def __init__(self, ingress: IngressAddress, replica_id: str, on_end: Callable[[TokenChannel], None]) -> None:
        self.ingress = ingress
        self._on_end = on_end
        options = (*KEEPALIVE, *UNLIMITED_MESSAGES)
        self._channel: Any = grpc.aio.insecure_channel(ingress.address, options=options)
        stub = tokens_pb2_grpc.TokenChannelStub(self._channel)  # type: ignore[no-untyped-call]
        self._call: Any = stub.Stream(metadata=(("octavo-replica", replica_id), ("octavo-token", ingress.token)))
        self._waiting: list[Any] = []
        self._accepted: list[int] = []
        self._notes: list[Any] = []
        self._num_notes = 0  # so far, which numbers them
        self.stats: EngineStats | None = None  # the newest that this end was given, and when
        self.stats_at = -math.inf
        self._due = False
        self._sent: list[asyncio.Future[None]] = []
        self._ready = asyncio.Event()
        self._closing = False
        self.ended = False
        self._life: asyncio.Task[None] | None = None

    async def connect(self) -> None:
        """Wait until the ingress has accepted the call. Raises ReplicaLost if it does not within CONNECT_S."""
        try:
            async with asyncio.timeout(CONNECT_S):
                await self._call.wait_for_connection()
        except (grpc.RpcError, TimeoutError) as error:
            await self._channel.close()
            why = error.details() if isinstance(error, grpc.aio.AioRpcError) else "no answer"
            raise ReplicaLost(f"The replica cannot reach the ingress at {self.ingress.address}: {why}.") from error
        self._call.add_done_callback(lambda _call: self._ready.set())
        self._life = asyncio.create_task(self._live(), name=f"token-channel-{self.ingress.id}")

    def accept(self, stream_id: int) -> None:
        """Tell the ingress that this replica has the request. Flushes at once."""
        self._accepted.append(stream_id)
        self._ready.set()

    def note(self, changes: BlockChanges) -> None:
        """Queue what became of the replica's blocks. It goes with the next batch."""
        if not self.ended:
            self._notes.append(wire.changes_to_proto(changes, self._num_notes))
            self._num_notes += 1

    @property
    def has_notes(self) -> bool:
        return bool(self._notes)

    def flush(self, stats: EngineStats) -> asyncio.Future[None]:
        """Send what is queued, and `stats`, now; as `send` without deltas."""
        return self.send((), stats)

    def send(self, deltas: Sequence[Any], stats: EngineStats) -> asyncio.Future[None]:
        """Queue one step's deltas; the future ends when they are written, or the channel is gone. Flushes at once."""
        sent: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self.ended:
            sent.set_result(None)
            return sent
        self._waiting.extend(deltas)
        self.stats, self.stats_at = stats, time.monotonic()
        self._due = True
        self._sent.append(sent)
        self._ready.set()
        return sent

    async def close(self) -> None:
        """Write what waits and wait until the ingress has taken it all, for at most CLOSE_S."""
        self._closing = True
        self._ready.set()
        if self._life is not None:
            await asyncio.wait([self._life], timeout=CLOSE_S)

    async def _live(self) -> None:
        try:
            while not self._call.done():
                if self._due or self._accepted:
                    await self._write()
                elif self._closing:
                    await self._call.write(tokens_pb2.TokenBatch(last=True))
                    await self._call.done_writing()
                    await self._call
                else:
                    self._ready.clear()
                    await self._ready.wait()
        except (grpc.RpcError, asyncio.InvalidStateError, TimeoutError) as error:
            logger.warning("the channel to ingress %s broke: %r", self.ingress.id, error)
        finally:
            self.ended = True
            self._waiting.clear()
            self._notes.clear()
            _settle(self._sent)
            self._on_end(self)
            await self._channel.close()

    async def _write(self) -> None:
        batch = tokens_pb2.TokenBatch(deltas=self._waiting, accepted=self._accepted, blocks=self._notes)
        if self.stats is not None:
            batch.stats.CopyFrom(wire.stats_to_proto(self.stats))
            batch.stats_age_s = time.monotonic() - self.stats_at
        sent, self._waiting, self._accepted, self._notes, self._sent = self._sent, [], [], [], []
        self._due = False
        try:
            async with asyncio.timeout(STALL_S):
                await self._call.write(batch)
        finally:
            _settle(sent)


class TokenSender:
    """All channels of one replica. `on_lost` is called with an ingress's id when its channel has ended."""

    def __init__(self, replica_id: str, on_lost: Callable[[str], None]) -> None:
        self._replica_id = replica_id
        self._on_lost = on_lost
        self._channels: dict[str, asyncio.Task[TokenChannel]] = {}

    async def channel(self, ingress: IngressAddress) -> TokenChannel:
        """The channel to `ingress`, connected now if it is not. Raises ReplicaLost if that fails."""
        connecting = self._channels.get(ingress.id)
        if connecting is None:
            connecting = self._channels[ingress.id] = asyncio.create_task(self._connect(ingress))
        return await asyncio.shield(connecting)  # one caller's cancellation must not fail the others

    async def close(self) -> None:
        """Close all channels in order."""
        standing = (task for task in self._channels.values() if task.done() and not task.cancelled())
        connected = [task.result() for task in standing if task.exception() is None]
        await asyncio.gather(*(channel.close() for channel in connected))

    async def _connect(self, ingress: IngressAddress) -> TokenChannel:
        channel = TokenChannel(ingress, self._replica_id, self._ended)
        try:
            await channel.connect()
        except ReplicaLost:
            self._channels.pop(ingress.id, None)  # the next request tries anew
            raise
        return channel

    def _ended(self, channel: TokenChannel) -> None:
        self._channels.pop(channel.ingress.id, None)
        self._on_lost(channel.ingress.id)


def _settle(futures: Sequence[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)

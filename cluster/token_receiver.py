"""TokenReceiver: the ingress's half of the side channel. Replicas dial in; their token batches go to the open inboxes.

Knows gRPC and mailboxes. Does not know Serve, HTTP or text. Everything here runs on the event loop that called `start`.

A replica says which streams it has accepted; from then on the end of its channel is the end of theirs.

What bounds it: a batch is read only after the one before it is delivered, so gRPC's flow control holds back a replica
that is faster than this process; an inbox holds at most the tokens of its own request.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import unquote

import grpc

from octavo.cluster import wire
from octavo.cluster.ingress.client import Mailbox, ReplicaLost
from octavo.engine.types import EngineStats
from octavo.protos.octavo.v1 import tokens_pb2, tokens_pb2_grpc

logger = logging.getLogger(__name__)

# Pings find a peer whose node or process stands still without a closed connection: after 1 + 2 seconds the call ends.
# A live process that is cut off by mistake costs its streams a pause and nothing else. Without a timeout of the ping
# itself gRPC waits for 60 s, or, while it has much to send, for about 10, whatever the keepalive's.
KEEPALIVE = (
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.http2.ping_timeout_ms", 2000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
UNLIMITED_MESSAGES = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))


@dataclass(eq=False, slots=True)
class Inbox:
    """Where the deltas of one attempt at a request arrive. `stream_id` is its number on the wire, never used twice:
    what a replica still sends for an attempt that was given up reaches nobody.

    `replica`: the one that has accepted the request; None so far.
    """

    stream_id: int
    request_id: str
    mailbox: Mailbox = field(default_factory=Mailbox)
    replica: str | None = None
    is_open: bool = True
    _settled: asyncio.Event = field(default_factory=asyncio.Event)

    def accept(self, replica: str) -> None:
        self.replica = replica
        self._settled.set()

    def fail(self, error: BaseException) -> None:
        """Who reads the mailbox gets `error` after all that has arrived."""
        self.mailbox.fail(error)
        self._settled.set()

    async def settled(self, within_s: float | None) -> bool:
        """Wait until a replica has accepted the request or it has failed; False if neither happened in time."""
        try:
            async with asyncio.timeout(within_s):
                await self._settled.wait()
        except TimeoutError:
            return False
        return True


class Listener(Protocol):
    """Who wants to hear of all replicas whose channels stand, whatever their model."""

    def on_batch(self, replica: str, batch: Any) -> None: ...

    def on_lost(self, replica: str) -> None: ...


class TokenReceiver:
    """One per ingress process. `stats`: the newest snapshot of every replica whose channel stands, by its id.

    `on_broken` is called with a replica's id and its host when its channel broke; not when the replica closed it.
    """

    def __init__(self, on_broken: Callable[[str, str], None] = lambda replica, host: None) -> None:
        self.stats: dict[str, EngineStats] = {}
        self.listeners: list[Listener] = []
        self.leaving: set[str] = set()  # replicas that have said that they stop: their end is no failure
        self._on_broken = on_broken
        self._id = secrets.token_hex(4)
        self._token = secrets.token_urlsafe(16)
        self._numbers = itertools.count(1)
        self._open: dict[int, Inbox] = {}
        self._server: Any = None
        self._address = ""

    async def start(self, host: str) -> None:
        """Listen on a free port of `host`, an address that replicas can reach."""
        options = (*KEEPALIVE, *UNLIMITED_MESSAGES, ("grpc.http2.max_ping_strikes", 0), ("grpc.so_reuseport", 0))
        self._server = grpc.aio.server(options=options)
        tokens_pb2_grpc.add_TokenChannelServicer_to_server(_Servicer(self), self._server)  # type: ignore[no-untyped-call]
        literal = f"[{host}]" if ":" in host else host
        port = self._server.add_insecure_port(f"{literal}:0")
        self._address = f"{literal}:{port}"
        await self._server.start()

    async def stop(self) -> None:
        """End all channels; replicas abort what they still carry."""
        self._on_broken = lambda replica, host: None  # it is this side that breaks them
        if self._server is not None:
            await self._server.stop(grace=None)

    @property
    def address(self) -> wire.IngressAddress:
        """What a replica needs to dial back. Valid once started."""
        return wire.IngressAddress(self._id, self._address, self._token)

    def open(self, request_id: str) -> Inbox:
        inbox = Inbox(next(self._numbers), request_id)
        self._open[inbox.stream_id] = inbox
        return inbox

    def close(self, inbox: Inbox) -> None:
        """Whatever still comes for it is dropped."""
        inbox.is_open = False
        self._open.pop(inbox.stream_id, None)

    def knows(self, token: str) -> bool:
        return hmac.compare_digest(token.encode(), self._token.encode())

    def deliver(self, replica: str, batch: Any, carried: set[int]) -> None:
        """Hand out a batch. `carried` gains the streams that this channel carries and loses those that ended."""
        for stream_id in batch.accepted:
            inbox = self._open.get(stream_id)
            if inbox is not None:
                carried.add(stream_id)
                inbox.accept(replica)
        for proto in batch.deltas:
            inbox = self._open.get(proto.stream_id)
            if inbox is None:  # aborted meanwhile
                carried.discard(proto.stream_id)
                continue
            if inbox.replica is None:
                inbox.accept(replica)
            carried.add(proto.stream_id)
            inbox.mailbox.put(wire.delta_from_proto(proto, inbox.request_id))
        if batch.HasField("stats"):
            self.stats[replica] = wire.stats_from_proto(batch.stats)
        for listener in self.listeners:
            listener.on_batch(replica, batch)

    def lose(self, replica: str, carried: set[int], broken_host: str | None = None) -> None:
        """The channel is gone: the requests it carried, as far as they are unfinished, end with ReplicaLost.

        `broken_host`: where the replica ran, if it did not close the channel itself.
        """
        self.stats.pop(replica, None)
        for listener in self.listeners:
            listener.on_lost(replica)
        for stream_id in carried:
            inbox = self._open.get(stream_id)
            if inbox is not None:
                inbox.fail(ReplicaLost(f"Replica {replica} went away while it served the request."))
        if broken_host is not None and replica not in self.leaving:
            self._on_broken(replica, broken_host)
        self.leaving.discard(replica)


class _Servicer(tokens_pb2_grpc.TokenChannelServicer):
    def __init__(self, receiver: TokenReceiver) -> None:
        self._receiver = receiver

    async def Stream(self, batches: AsyncIterator[Any], context: Any) -> Any:
        metadata = dict(context.invocation_metadata())
        if not self._receiver.knows(metadata.get("octavo-token", "")):
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "This is not the ingress that sent the request.")
        replica = metadata.get("octavo-replica", "")
        await context.send_initial_metadata(())
        logger.info("replica %s has opened its token channel", replica)
        carried: set[int] = set()
        broken_host: str | None = _host(context.peer())
        try:
            async for batch in batches:
                self._receiver.deliver(replica, batch, carried)
                if batch.last:
                    broken_host = None
        finally:
            self._receiver.lose(replica, carried, broken_host)
            logger.info("the token channel of replica %s %s", replica, "is closed" if broken_host is None else "broke")
        return tokens_pb2.StreamEnd()


def _host(peer: str) -> str:
    """gRPC's name of a peer (ipv4:10.0.0.1:555, ipv6:%5B::1%5D:555) → its address."""
    return unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]")

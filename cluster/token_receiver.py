"""TokenReceiver: the ingress's half of the side channel. Replicas dial in; their token batches go to the open inboxes.

Knows gRPC and mailboxes. Does not know Serve, HTTP or text. Everything here runs on the event loop that called `start`.

What bounds it: a batch is read only after the one before it is delivered, so gRPC's flow control holds back a replica
that is faster than this process; an inbox holds at most the tokens of its own request.
"""

from __future__ import annotations

import hmac
import itertools
import logging
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc

from octavo.cluster import wire
from octavo.cluster.ingress.client import Mailbox, ReplicaLost
from octavo.engine.types import EngineStats
from octavo.protos.octavo.v1 import tokens_pb2, tokens_pb2_grpc

logger = logging.getLogger(__name__)

# Pings find a peer whose node or process stands still without a closed connection: after 2 + 3 seconds the call ends.
KEEPALIVE = (
    ("grpc.keepalive_time_ms", 2000),
    ("grpc.keepalive_timeout_ms", 3000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
UNLIMITED_MESSAGES = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))


@dataclass(eq=False, slots=True)
class Inbox:
    """Where the deltas of one request arrive. `stream_id` is its number on the wire, never used twice."""

    stream_id: int
    request_id: str
    mailbox: Mailbox = field(default_factory=Mailbox)
    is_open: bool = True


class TokenReceiver:
    """One per ingress process. `stats`: the newest snapshot of every replica whose channel stands, by its id."""

    def __init__(self) -> None:
        self.stats: dict[str, EngineStats] = {}
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
        for proto in batch.deltas:
            inbox = self._open.get(proto.stream_id)
            if inbox is None:  # aborted meanwhile
                carried.discard(proto.stream_id)
                continue
            carried.add(proto.stream_id)
            inbox.mailbox.put(wire.delta_from_proto(proto, inbox.request_id))
        self.stats[replica] = wire.stats_from_proto(batch.stats)

    def lose(self, replica: str, carried: set[int]) -> None:
        """The channel is gone: the requests it carried, as far as they are unfinished, end with ReplicaLost."""
        self.stats.pop(replica, None)
        for stream_id in carried:
            inbox = self._open.get(stream_id)
            if inbox is not None:
                inbox.mailbox.fail(ReplicaLost(f"Replica {replica} went away while it served the request."))


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
        try:
            async for batch in batches:
                self._receiver.deliver(replica, batch, carried)
        finally:
            self._receiver.lose(replica, carried)
            logger.info("replica %s has closed its token channel", replica)
        return tokens_pb2.StreamEnd()

"""The way of plans and results: one TCP connection from each rank to the driver, a frame per message.

Knows sockets, frames and who may connect. Does not know what is said (wire.py), nor what a silence means (ranks.py).
A frame is its length, 4 bytes in network order, and that many bytes. Nobody polls: an idle connection costs no CPU.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import selectors
import socket
import struct
import threading
import time
from collections.abc import Sequence
from typing import Generic, TypeVar

import msgspec

from octavo.engine.process import wire

MAX_FRAME = 1 << 30
MAX_HELLO = 1 << 10  # of a peer that is not known yet
MAX_STRANGERS = 64
HELLO_TIMEOUT_S = 10.0
# A peer whose machine is gone says nothing: the kernel gives up on it after this.
PEER_TIMEOUT_S = 10
_LENGTH = struct.Struct("!I")
_CHUNK = 1 << 17

T = TypeVar("T")


class ChannelClosed(Exception):
    """The other side is gone."""


class _Frames(Generic[T]):
    """Bytes as they come → messages."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[T], longest: int = MAX_FRAME) -> None:
        self._decoder, self.longest = decoder, longest
        self._bytes = bytearray()

    def feed(self, data: bytes) -> list[T]:
        """Raises ValueError for what is no message."""
        self._bytes += data
        found, start, end = [], 0, len(self._bytes)
        with memoryview(self._bytes) as view:
            while end - start >= 4:
                (length,) = _LENGTH.unpack_from(view, start)
                if length > self.longest:
                    raise ValueError(f"a frame of {length} bytes")
                if end - start - 4 < length:
                    break
                found.append(self._decoder.decode(view[start + 4 : start + 4 + length]))
                start += 4 + length
        if start:
            del self._bytes[:start]
        return found


def _frame(message: object) -> bytes:
    body = wire.encode(message)
    return _LENGTH.pack(len(body)) + body


def _tune(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 3), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, PEER_TIMEOUT_S * 1000)


class Hub:
    """The driver's side. One thread at a time. Nothing waits for a rank: what its socket has no room for, since it
    computes and reads later, goes on with the next `poll`.

    host: an address of this node that all ranks reach.
    """

    def __init__(self, host: str, size: int, token: str) -> None:
        self._token, self._size = token, size
        self._listener = socket.create_server((host, 0), backlog=size + MAX_STRANGERS)
        self._listener.setblocking(False)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._peers: dict[int, _Peer] = {}
        self._strangers: list[_Peer] = []
        self._broken: list[int] = []  # ranks to whom a send failed, not yet told by `poll`

    def broadcast(self, message: wire.ToRank, ranks: Sequence[int] | None = None) -> None:
        """Send to every rank, encoded once. Never raises: the next `poll` tells whose connection is gone."""
        frame = _frame(message)
        for rank in tuple(self._peers) if ranks is None else ranks:
            peer = self._peers.get(rank)
            if peer is None:
                continue
            peer.unsent += frame
            if len(peer.unsent) == len(frame):  # else a poll is on it
                self._send(peer)
                if peer.unsent:
                    self._selector.modify(peer.socket, selectors.EVENT_READ | selectors.EVENT_WRITE, peer)

    def poll(self, timeout_s: float) -> list[tuple[int, wire.ToDriver | None]]:
        """What came, as (rank, message), in order; a message None: that rank's connection ended. Waits up to timeout_s
        for the first."""
        found: list[tuple[int, wire.ToDriver | None]] = []
        if self._broken:
            found += [(rank, None) for rank in self._broken if self._forget(rank)]
            self._broken.clear()
            timeout_s = 0
        for key, events in self._selector.select(timeout_s):
            if key.fileobj is self._listener:
                self._accept()
                continue
            peer: _Peer = key.data
            if events & selectors.EVENT_WRITE:
                self._send(peer)
                if not peer.unsent:
                    self._selector.modify(peer.socket, selectors.EVENT_READ, peer)
            if events & selectors.EVENT_READ:
                self._read(peer, found)
        if self._strangers:
            self._drop_slow_strangers()
        return found

    def close(self) -> None:
        for peer in (*self._peers.values(), *self._strangers):
            peer.socket.close()
        self._peers.clear()
        self._strangers.clear()
        self._listener.close()
        self._selector.close()

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            connection, _ = self._listener.accept()
            if len(self._strangers) >= MAX_STRANGERS:
                connection.close()
                return
            connection.setblocking(False)
            _tune(connection)
            peer = _Peer(connection)
            self._strangers.append(peer)
            self._selector.register(connection, selectors.EVENT_READ, peer)

    def _send(self, peer: _Peer) -> None:
        """As much as there is room for."""
        try:
            del peer.unsent[: peer.socket.send(peer.unsent)]
        except BlockingIOError:
            return
        except OSError:
            peer.unsent.clear()
            if peer.rank is not None:
                self._broken.append(peer.rank)

    def _read(self, peer: _Peer, found: list[tuple[int, wire.ToDriver | None]]) -> None:
        try:
            data = peer.socket.recv(_CHUNK)
            messages = peer.frames.feed(data)
        except BlockingIOError:
            return
        except (OSError, ValueError):  # msgspec's errors are ValueErrors
            data, messages = b"", []
        for message in messages:
            if peer.rank is None and not self._greet(peer, message):
                data = b""
                break
            assert peer.rank is not None
            found.append((peer.rank, message))
        if data:
            return
        if peer.rank is None:
            self._turn_away(peer)
        elif self._forget(peer.rank):
            found.append((peer.rank, None))

    def _greet(self, peer: _Peer, message: wire.ToDriver) -> bool:
        """Whether a stranger is one of the ranks, come for the first time."""
        if not isinstance(message, wire.Hello) or not hmac.compare_digest(message.token, self._token):
            return False
        if not 0 <= message.rank < self._size or message.rank in self._peers:
            return False
        self._strangers.remove(peer)
        peer.rank, peer.frames.longest = message.rank, MAX_FRAME
        self._peers[message.rank] = peer
        return True

    def _drop_slow_strangers(self) -> None:
        now = time.monotonic()
        for peer in [p for p in self._strangers if now - p.since > HELLO_TIMEOUT_S]:
            self._turn_away(peer)

    def _turn_away(self, peer: _Peer) -> None:
        self._strangers.remove(peer)
        self._selector.unregister(peer.socket)
        peer.socket.close()

    def _forget(self, rank: int) -> bool:
        peer = self._peers.pop(rank, None)
        if peer is None:
            return False
        self._selector.unregister(peer.socket)
        peer.socket.close()
        return True


class _Peer:
    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.frames = _Frames(wire.to_driver, MAX_HELLO)
        self.unsent = bytearray()
        self.rank: int | None = None
        self.since = time.monotonic()


class Line:
    """A rank's side. One thread receives; any thread may send."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._frames = _Frames(wire.to_rank)
        self._waiting: list[wire.ToRank] = []
        self._lock = threading.Lock()

    @property
    def own_address(self) -> str:
        """Of this node, on the way to the driver."""
        return str(self.socket.getsockname()[0])

    def send(self, message: wire.ToDriver) -> None:
        """Raises ChannelClosed."""
        frame = _frame(message)
        try:
            with self._lock:
                self.socket.sendall(frame)
        except OSError as error:
            raise ChannelClosed(str(error)) from error

    def receive(self) -> wire.ToRank:
        """The next message, whenever it comes. Raises ChannelClosed."""
        while not self._waiting:
            try:
                data = self.socket.recv(_CHUNK)
            except OSError as error:
                raise ChannelClosed(str(error)) from error
            if not data:
                raise ChannelClosed("the driver closed the connection")
            self._waiting = self._frames.feed(data)
        return self._waiting.pop(0)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


def dial(address: tuple[str, int], hello: wire.Hello, timeout_s: float = 30.0) -> Line:
    """Connect to the driver, which listens already. Raises ChannelClosed if it cannot be reached in time."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            connection = socket.create_connection(address, timeout=max(0.1, deadline - time.monotonic()))
            break
        except OSError as error:
            passing = error.errno in (errno.ECONNREFUSED, errno.ENETUNREACH, errno.EHOSTUNREACH)
            if not passing or time.monotonic() > deadline:
                raise ChannelClosed(f"{address[0]}:{address[1]} cannot be reached: {error}") from error
            time.sleep(0.2)  # a network that is just coming up
    connection.settimeout(None)
    _tune(connection)
    line = Line(connection)
    line.send(hello)
    return line

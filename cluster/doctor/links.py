"""TCP between two nodes: an echo that answers with the time, and what one connection to it tells. No Ray here."""

from __future__ import annotations

import contextlib
import secrets
import socket
import struct
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from octavo.cluster.doctor.facts import Link

NONCE_BYTES = 16
CLOCK = struct.Struct("=d")
ROUNDS = 5
IDLE_S = 10.0
AT_ONCE = 32  # connections that a node tries side by side


@dataclass(frozen=True, slots=True)
class Peer:
    """Where a node's echo listens."""

    node_id: str
    address: str
    port: int


class Echo:
    """Answers 16 bytes with the same 16 bytes and this machine's wall clock, on a free port of all addresses."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("", 0), backlog=128)
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, name="octavo-doctor-echo", daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return  # closed
            threading.Thread(target=_answer, args=(connection,), daemon=True).start()


def measure(source: str, peers: Sequence[Peer], timeout_s: float) -> tuple[Link, ...]:
    """The links from node `source`, where this runs, to `peers`, in their order. Each takes at most `timeout_s`."""
    if not peers:
        return ()
    with ThreadPoolExecutor(min(AT_ONCE, len(peers))) as pool:
        return tuple(pool.map(lambda peer: _measure(source, peer, timeout_s), peers))


def _measure(source: str, peer: Peer, timeout_s: float) -> Link:
    deadline = time.monotonic() + timeout_s
    try:
        with socket.create_connection((peer.address, peer.port), timeout=timeout_s) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            rounds = []
            for _ in range(ROUNDS):
                connection.settimeout(max(0.01, deadline - time.monotonic()))
                rounds.append(_ask(connection))
            round_trip_s, ahead_s = min(rounds)
            return Link(source, peer.node_id, connection.getsockname()[0], round_trip_s, ahead_s)
    except TimeoutError:
        return Link(source, peer.node_id, error=f"no answer within {timeout_s:g} s")
    except OSError as error:
        return Link(source, peer.node_id, error=(error.strerror or str(error)).lower())


def _ask(connection: socket.socket) -> tuple[float, float]:
    """(round trip, the other clock minus this one), in seconds."""
    nonce = secrets.token_bytes(NONCE_BYTES)
    wall, started = time.time(), time.perf_counter()
    connection.sendall(nonce)
    answer = _read(connection, NONCE_BYTES + CLOCK.size)
    round_trip_s = time.perf_counter() - started
    if answer[:NONCE_BYTES] != nonce:
        raise OSError("somebody else answers at that address")
    (theirs,) = CLOCK.unpack(answer[NONCE_BYTES:])
    return round_trip_s, theirs - (wall + round_trip_s / 2)


def _answer(connection: socket.socket) -> None:
    with connection, contextlib.suppress(OSError):
        connection.settimeout(IDLE_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while True:
            nonce = _read(connection, NONCE_BYTES)
            connection.sendall(nonce + CLOCK.pack(time.time()))


def _read(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            raise OSError("the connection was closed")
        data += part
    return data

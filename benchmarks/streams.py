"""Streams: a client that costs next to nothing. Many event streams over raw sockets, read in one loop.

Knows just enough HTTP to ask for a stream, and of what comes it looks only at where events begin and end, so that what
it measures is the server.
"""

from __future__ import annotations

import json
import selectors
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

EVENT = b"data: {"  # as long as END begins: no answer of a fake model has this in its text
END = b"[DONE]"
TIMEOUT_S = 120.0


@dataclass(eq=False, slots=True)
class Stream:
    """One answer. arrivals: when each event came, seconds on time.perf_counter(); `[DONE]` is not counted."""

    sent_at: float
    status: int = 0
    arrivals: list[float] = field(default_factory=list)
    done: bool = False
    _tail: bytes = b""

    @property
    def ttft_s(self) -> float:
        return self.arrivals[0] - self.sent_at

    @property
    def gaps_s(self) -> list[float]:
        return [after - before for before, after in zip(self.arrivals, self.arrivals[1:], strict=False)]

    def take(self, data: bytes, now: float) -> None:
        if not self.status:
            self.status = int(data[9:12])
        seen = self._tail + data
        self.arrivals += [now] * seen.count(EVENT)
        self.done = self.done or END in seen
        self._tail = seen[1 - len(EVENT) :]  # a mark may be cut in two; none fits in here whole


def request_bytes(body: Mapping[str, Any], path: str = "/v1/completions") -> bytes:
    payload = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    )
    return head.encode() + payload


def run_streams(port: int, bodies: Sequence[Mapping[str, Any]], within_s: float = TIMEOUT_S) -> list[Stream]:
    """Ask for all of `bodies` at once and read until each stream has ended. Raises TimeoutError if one does not."""
    selector = selectors.DefaultSelector()
    streams = []
    for body in bodies:
        connection = socket.create_connection(("127.0.0.1", port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        data = request_bytes(body)
        stream = Stream(time.perf_counter())
        connection.sendall(data)
        connection.setblocking(False)
        selector.register(connection, selectors.EVENT_READ, stream)
        streams.append(stream)
    deadline = time.perf_counter() + within_s
    while any(not stream.done for stream in streams):
        ready = selector.select(timeout=1.0)
        now = time.perf_counter()
        if now > deadline:
            raise TimeoutError(f"{sum(not stream.done for stream in streams)} streams have not ended.")
        for key, _ in ready:
            data = key.fileobj.recv(1 << 18)  # type: ignore[union-attr]
            if data:
                key.data.take(data, now)
            if not data or key.data.done:
                key.data.done = True
                selector.unregister(key.fileobj)
                key.fileobj.close()  # type: ignore[union-attr]
    return streams

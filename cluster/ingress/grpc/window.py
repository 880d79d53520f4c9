"""Window: back-pressure through Serve, which takes all that a streaming method yields, at once, into a queue.

Serve asks a message for its bytes when it is about to send it: so a Parcel tells its Window that it has left the queue.
While a client does not read, no more is put in; its tokens wait in the request's mailbox, where they merge.
"""

from __future__ import annotations

import asyncio
from typing import Any

UNSENT = 64  # messages: above what a burst of steps brings, so that it never costs a reader that keeps up anything


class Window:
    """How many of a stream's messages are yielded and not yet sent. `room` is for the event loop it was made on."""

    def __init__(self, size: int = UNSENT) -> None:
        self._size = size
        self._loop = asyncio.get_running_loop()
        self._room = asyncio.Event()
        self._waiting = False
        self._put = 0  # counted on the event loop alone
        self._sent = 0  # counted on the sender's thread alone

    def parcel(self, message: Any) -> Parcel:
        self._put += 1
        return Parcel(message, self)

    @property
    def unsent(self) -> int:
        return self._put - self._sent

    async def room(self) -> None:
        """Wait until there is room for one more message."""
        while self.unsent >= self._size:
            self._room.clear()
            self._waiting = True  # before looking again: what is sent from now on is told
            if self.unsent >= self._size:
                await self._room.wait()
        self._waiting = False

    def sent(self) -> None:
        """One message has left; called on the sender's thread."""
        self._sent += 1
        if self._waiting:
            self._loop.call_soon_threadsafe(self._room.set)


class Parcel:
    """A protobuf message, as far as Serve needs it to be one."""

    __slots__ = ("_window", "message")

    def __init__(self, message: Any, window: Window) -> None:
        self.message = message
        self._window = window

    def SerializeToString(self) -> bytes:  # protobuf's name
        self._window.sent()
        return bytes(self.message.SerializeToString())

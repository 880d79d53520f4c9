"""Responses kept for later requests: previous_response_id, item references, GET. In memory, and only here.

Another ingress knows nothing of them, and a restart forgets them. What is kept is bounded by the memory it takes; the
response that was not asked about for the longest time goes first.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

StoredItem = dict[str, Any]  # as JSON has it, with an id


@dataclass(frozen=True, slots=True)
class Stored:
    """reply: the response as it was answered. inputs: the request's own items. past: what had been said before, the
    oldest first. num_bytes: of memory, of all three.
    """

    reply: dict[str, Any]
    inputs: tuple[StoredItem, ...]
    past: tuple[StoredItem, ...]
    num_bytes: int

    @classmethod
    def of(cls, reply: dict[str, Any], inputs: tuple[StoredItem, ...], previous: Stored | None) -> Stored:
        """`previous`: the response that this one goes on from."""
        size = _num_bytes([reply, *inputs])
        if previous is None:
            return cls(reply, inputs, (), size)
        return cls(reply, inputs, previous.conversation, size + previous.num_bytes)

    @property
    def own(self) -> tuple[StoredItem, ...]:
        return (*self.inputs, *self.reply["output"])

    @property
    def conversation(self) -> tuple[StoredItem, ...]:
        """All that was said, this response included."""
        return (*self.past, *self.own)


class ResponseStore:
    """At most `max_bytes` of responses, 0 = none. What is said in a conversation counts anew in each of its responses
    though they share it: together they never take more than is counted.
    """

    def __init__(self, max_bytes: int) -> None:
        self.num_bytes = 0
        self._max_bytes = max_bytes
        self._stored: OrderedDict[str, Stored] = OrderedDict()
        self._items: dict[str, StoredItem] = {}  # of what is stored, by id

    def __len__(self) -> int:
        return len(self._stored)

    def keep(self, stored: Stored) -> None:
        """Forgets others where it must; what is larger than the store is not kept."""
        if stored.num_bytes > self._max_bytes:
            return
        while self.num_bytes + stored.num_bytes > self._max_bytes:
            self.drop(next(iter(self._stored)))
        self.num_bytes += stored.num_bytes
        self._stored[stored.reply["id"]] = stored
        self._items.update((item["id"], item) for item in stored.own)

    def find(self, response_id: str) -> Stored | None:
        stored = self._stored.get(response_id)
        if stored is not None:
            self._stored.move_to_end(response_id)
        return stored

    def item(self, item_id: str) -> StoredItem | None:
        return self._items.get(item_id)

    def drop(self, response_id: str) -> bool:
        """Forget a response. False: there was none."""
        stored = self._stored.pop(response_id, None)
        if stored is None:
            return False
        self.num_bytes -= stored.num_bytes
        for item in stored.own:
            if self._items.get(item["id"]) is item:  # a client may have sent it again since
                del self._items[item["id"]]
        return True


def _num_bytes(value: Any) -> int:
    """Of memory that JSON takes in Python. Its depth is bounded by the parser that read it."""
    own = sys.getsizeof(value)
    if isinstance(value, dict):
        return own + sum(_num_bytes(name) + _num_bytes(item) for name, item in value.items())
    if isinstance(value, list):
        return own + sum(map(_num_bytes, value))
    return own

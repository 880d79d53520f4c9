"""WaitingQueue: sequences that wait for admission, in the policy's order."""

from __future__ import annotations

import heapq

from octavo.engine.core.policy import Key
from octavo.engine.core.sequence import Sequence, State


class WaitingQueue:
    """A heap by `Sequence.key`. A sequence that stopped waiting (abort) is dropped when it comes to the front; until
    then it may come back and wait again.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[Key, Sequence]] = []
        self._keys: set[Key] = set()  # in the heap

    def push(self, sequence: Sequence) -> None:
        assert sequence.state is State.WAITING, sequence.state
        if sequence.key not in self._keys:
            self._keys.add(sequence.key)
            heapq.heappush(self._heap, (sequence.key, sequence))  # keys are unique: sequences are never compared

    def pop(self) -> Sequence | None:
        """The next waiting sequence, taken out; None if nobody waits."""
        while self._heap:
            key, sequence = heapq.heappop(self._heap)
            self._keys.remove(key)
            if sequence.state is State.WAITING:
                return sequence
        return None

"""Admission: whether a request is let in at all. One that would wait too long is told so before any work goes into it.

Knows a limit and an estimate. Does not know where the estimate comes from.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from octavo.engine.errors import CapacityError

# Nobody is sent away for longer: by then things may look different.
LONGEST_RETRY_S = 60


class Admission:
    """`expected_wait_s`: how long a newcomer would wait before its prompt is computed, at the replica best for it."""

    def __init__(self, max_wait_s: float | None, expected_wait_s: Callable[[], float]) -> None:
        self._max_wait_s = math.inf if max_wait_s is None else max_wait_s
        self._expected_wait_s = expected_wait_s

    def check(self) -> None:
        """Raises CapacityError, with the time after which the queue should be short enough."""
        if self._max_wait_s == math.inf:
            return
        wait_s = self._expected_wait_s()
        if wait_s <= self._max_wait_s:
            return
        retry_after_s = min(LONGEST_RETRY_S, math.ceil(min(wait_s - self._max_wait_s, LONGEST_RETRY_S)))
        raise CapacityError(
            f"The queue is too long: a new request would wait longer than the {self._max_wait_s:g} s allowed.",
            retry_after_s=max(1, retry_after_s),
        )

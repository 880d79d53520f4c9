"""Pace: how fast a replica takes up prompts that wait, and so how long a newcomer would wait there.

Knows the engine's counters. A replica that has room takes up what comes, at a rate that says nothing of what it could
do; so only the time counts in which some waited.
"""

from __future__ import annotations

import math

from octavo.engine.types import EngineStats

# Older observations count less: after so many seconds of waiting, a third.
MEMORY_S = 10.0
# Before so many seconds of waiting have been seen, nothing is known.
ENOUGH_S = 1.0


class Pace:
    """Of one replica. Times in seconds on any one clock."""

    def __init__(self) -> None:
        self._stats = EngineStats()
        self._at = -math.inf
        self._tokens = 0.0
        self._seconds = 0.0

    def observe(self, stats: EngineStats, now: float) -> None:
        """`stats` of the replica as they were at `now`; in order."""
        seconds = now - self._at
        if self._stats.waiting_tokens and stats.waiting_tokens and seconds > 0:
            old = math.exp(-seconds / MEMORY_S)
            self._tokens = self._tokens * old + stats.prompt_tokens - self._stats.prompt_tokens
            self._seconds = self._seconds * old + seconds
        self._stats, self._at = stats, now

    @property
    def tokens_per_s(self) -> float | None:
        """Prompt tokens, cached ones too; None while too little is known."""
        return self._tokens / self._seconds if self._seconds >= ENOUGH_S else None

    def wait_s(self, tokens: float) -> float:
        """How long whoever comes behind `tokens` prompt tokens waits; 0 while nothing is known."""
        rate = self.tokens_per_s
        if not tokens or rate is None:
            return 0.0
        return tokens / rate if rate > 0 else math.inf

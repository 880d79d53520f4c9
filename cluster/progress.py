"""Progress: is the engine going forward? Health is that, and nothing else: a busy engine is a healthy one."""

from __future__ import annotations

from octavo.engine.errors import RankLost


class Progress:
    """Watches the count of finished steps against work waiting, from one check to the next.

    `step_timeout_s`: how long no step may finish while there is work. Must be above the longest step there can be.
    """

    def __init__(self, step_timeout_s: float) -> None:
        self._step_timeout_s = step_timeout_s
        self._steps = -1
        self._since: float | None = None  # when a step was last seen to have finished, or work to have come

    def check(self, now: float, steps: int, has_work: bool) -> None:
        """Raises RankLost if no step has finished for `step_timeout_s` seconds of checks that all saw work."""
        if not has_work:
            self._since = None
        elif self._since is None or steps != self._steps:
            self._since = now
        elif now - self._since > self._step_timeout_s:
            raise RankLost(f"No step has finished for {now - self._since:.0f} s although requests are waiting.")
        self._steps = steps

"""Is the engine going forward? Health is that, and nothing else: a busy engine is a healthy one.

Judged on a thread of its own, which no event loop can starve, however many requests there are.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from octavo.engine.errors import RankLost

logger = logging.getLogger(__name__)

LOOK_S = 0.1


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
            raise RankLost(f"No step has finished for {now - self._since:.3g} s although requests are waiting.")
        self._steps = steps


class Supervisor:
    """A thread that calls `look(now)` every LOOK_S seconds until it raises, and then `failed(error)`, once.

    `now` is monotonic seconds. `failure`: what `look` raised.
    """

    def __init__(self, look: Callable[[float], None], failed: Callable[[BaseException], None]) -> None:
        self.failure: BaseException | None = None
        self._look = look
        self._failed = failed
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="octavo-supervisor", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(LOOK_S):
            try:
                self._look(time.monotonic())
            except BaseException as error:
                self.failure = error
                break
        if self.failure is not None:
            try:
                self._failed(self.failure)
            except Exception:
                logger.exception("the failure could not be acted on: %s", self.failure)

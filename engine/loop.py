"""EngineLoop: the thread that steps an EngineCore while there is work, and the door other threads use.

Knows threads. Does not know asyncio, text or transport: whoever wants deltas elsewhere takes them over in `on_deltas`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from octavo.engine.core.blocks import BlockPool
from octavo.engine.core.engine import EngineCore
from octavo.engine.errors import CapacityError, OctavoError, RankLost
from octavo.engine.types import EngineStats, RankStatus, Request, TokenDelta

log = logging.getLogger(__name__)

CHECK_INTERVAL_S = 0.5  # between looks at the ranks while nothing runs


class EngineLoop:
    """Steps `core` on a thread. `on_deltas` is called there, once per step that brought something; it must not block.

    `submit`, `abort`, `stats` and `stop` may be called from any thread.
    """

    def __init__(self, core: EngineCore, on_deltas: Callable[[list[TokenDelta]], None]) -> None:
        self.core = core
        self.failure: BaseException | None = None  # set once, when the engine cannot go on
        self._on_deltas = on_deltas
        self._inbox: deque[tuple[Literal["add"], Request] | tuple[Literal["abort"], str]] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._live: set[str] = set()  # ids submitted and not finished; changed by the loop's thread and by submit
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="octavo-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queue a request. Raises RequestError, CapacityError or, when the engine is gone, RankLost, at once."""
        if self.failure is not None:
            raise RankLost(f"The engine has failed: {self.failure}")
        if self._stopping:
            raise CapacityError("The engine is shutting down.", retry_after_s=5)
        self.core.check_request(request)
        on_the_way = (len(item.sequences) for _, item in tuple(self._inbox) if not isinstance(item, str))
        self.core.check_room(sum(on_the_way))
        with self._lock:
            self._live.add(request.request_id)
        self._inbox.append(("add", request))
        self._wake.set()

    def abort(self, request_id: str) -> None:
        """End a request before the next step is planned. Unknown ids are ignored."""
        self._inbox.append(("abort", request_id))
        self._wake.set()

    @property
    def pool(self) -> BlockPool:
        """The engine's blocks. They belong to the loop's thread: see BlockPool for what others may do."""
        return self.core.scheduler.pool

    def stats(self) -> EngineStats:
        return self.core.stats()

    def ranks(self) -> tuple[RankStatus, ...]:
        return self.core.ranks()

    @property
    def num_live(self) -> int:
        """Requests submitted and not finished."""
        return len(self._live)

    def stop(self, drain_s: float = 0.0) -> None:
        """Refuse new requests, let the live ones finish for up to `drain_s` seconds, abort the rest, end the thread."""
        self._stopping = True
        deadline = time.monotonic() + drain_s
        while self._live and time.monotonic() < deadline and self._thread.is_alive():
            time.sleep(0.02)
        for request_id in tuple(self._live):
            self.abort(request_id)
        self._inbox.append(("abort", ""))
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=30)
        self.core.close()

    def _run(self) -> None:
        try:
            while True:
                self._take_inbox()
                if self.core.has_work:
                    self._publish(self.core.step())
                elif self._stopping and not self._inbox:
                    return
                elif not self._inbox:
                    self._wake.wait(timeout=CHECK_INTERVAL_S)
                    self._wake.clear()
                    self.core.check()
        except BaseException as error:
            self._die(error)

    def _take_inbox(self) -> None:
        while self._inbox:
            self._take(self._inbox[0][1])
            self._inbox.popleft()  # not before: what is in neither place, `submit` would not count

    def _take(self, item: Request | str) -> None:
        if isinstance(item, str):
            self._publish(self.core.abort(item))
            return
        try:
            self._publish(self.core.add(item))
        except OctavoError as error:  # lost a race with another submit: the same id, or the last place in the queue
            self._refuse(item.request_id, [wanted.index for wanted in item.sequences], str(error))

    def _publish(self, deltas: list[TokenDelta]) -> None:
        if not deltas:
            return
        ended = {d.request_id for d in deltas if d.finish_reason and not self.core.scheduler.is_live(d.request_id)}
        if ended:
            with self._lock:
                self._live -= ended
        try:
            self._on_deltas(deltas)
        except Exception:
            log.exception("on_deltas failed; %d deltas are lost", len(deltas))

    def _refuse(self, request_id: str, indices: Sequence[int], error: str) -> None:
        self._publish([TokenDelta(request_id, i, (), finish_reason="error", error=error) for i in indices])

    def _die(self, error: BaseException) -> None:
        """The engine cannot go on: say so to everybody who waits, once."""
        self.failure = error
        log.critical("the engine stopped: %s", error, exc_info=error)
        message = f"The engine has failed: {type(error).__name__}: {error}"
        for request_id in tuple(self._live):
            try:
                deltas = self.core.abort(request_id)
                self._publish([replace(d, finish_reason="error", error=message) for d in deltas])
            except Exception:
                log.debug("abort of %s after the failure", request_id, exc_info=True)
        for request_id in tuple(self._live):
            self._refuse(request_id, [0], message)

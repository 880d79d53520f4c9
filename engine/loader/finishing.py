"""Layers that have all their tensors, brought into the form they are applied in: by threads, beside the loading.

Knows layers and threads, not what finishing is.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from octavo.engine.layers.weight import Layer
from octavo.engine.loader.memory import give_back


class Finishing:
    """A context; at its end all layers are finished. workers: layers that are finished at once, and are there twice for
    so long; 1 = by the caller itself."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._pool = ThreadPoolExecutor(workers, "finish-layers") if workers > 1 else None
        self._running: deque[Future[None]] = deque()

    def __enter__(self) -> Finishing:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=kind is not None)
        while kind is None and self._running:
            self._running.popleft().result()

    def finish(self, layer: Layer) -> None:
        """Raises what an earlier layer could not be finished for."""
        if self._pool is None:
            _finish(layer)
            return
        while len(self._running) >= self._workers:
            self._running.popleft().result()
        self._running.append(self._pool.submit(_finish, layer))


def _finish(layer: Layer) -> None:
    layer.finish()
    give_back()

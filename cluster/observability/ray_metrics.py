"""The metrics of /metrics through Ray's metrics agent: Ray's dashboard and its Prometheus see them without asking us.

A sample `octavo:name_total` becomes `ray_octavo_name_total`, with its labels beside Ray's own. All are gauges to Ray,
counters and histograms' buckets too: they are pushed as the totals they are, so what Prometheus computes of them is the
same. Ray's own counters would be shown on after the process that counted is gone; its gauges go with the process.

Knows prometheus_client's metrics and Ray's. Does not know what they are about.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable

from prometheus_client.core import Metric
from ray.util.metrics import Gauge

logger = logging.getLogger(__name__)

PUSH_S = 1.0


class RayMetrics:
    """Pushes what `collect` gives on a thread of its own, once every PUSH_S. `close` ends that."""

    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect
        self._gauges: dict[str, Gauge] = {}
        self._stopped = threading.Event()
        self._has_failed = False
        self._thread = threading.Thread(target=self._run, name="octavo-ray-metrics", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stopped.set()

    def push(self) -> None:
        for metric in self._collect():
            for sample in metric.samples:
                if not sample.name.endswith("_created"):
                    self._gauge(sample.name, metric.documentation, sample.labels).set(sample.value, sample.labels)

    def _gauge(self, name: str, text: str, labels: dict[str, str]) -> Gauge:
        gauge = self._gauges.get(name)
        if gauge is None:
            gauge = self._gauges[name] = Gauge(name.replace(":", "_"), text, tuple(labels))
        return gauge

    def _run(self) -> None:
        while not self._stopped.wait(PUSH_S):
            try:
                self.push()
            except Exception:
                if not self._has_failed:
                    logger.exception("metrics cannot be given to Ray; this is said once")
                self._has_failed = True

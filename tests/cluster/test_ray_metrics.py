"""Metrics through Ray's agent: on a live node, they are /metrics' own numbers under Ray's names."""

import time

import httpx
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from octavo.cluster.observability import ray_metrics
from octavo.cluster.observability.metrics import Finished, IngressMetrics, engine_metrics, exposition
from octavo.cluster.observability.ray_metrics import RayMetrics
from octavo.engine.params import SamplingParams
from octavo.engine.types import EngineStats

pytestmark = pytest.mark.live

ENGINES = {"r-1": EngineStats(num_running=2, steps=7), "r-2": EngineStats(kv_blocks_total=4, kv_blocks_held=1)}


def parsed(text: str) -> dict[tuple[str, frozenset], float]:
    """(name, labels) → value of octavo's samples, with /metrics' names and without Ray's own labels."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name.replace("ray_octavo_", "octavo:")
            if not name.startswith("octavo:") or name.endswith("_created"):
                continue
            ours = {"model_name", "ingress", "replica", "engine", "finished_reason", "reason", "le"}
            labels = {key: value for key, value in sample.labels.items() if key in ours}
            if "replica" in labels:
                labels["engine"] = labels.pop("replica")
            found[name, frozenset(labels.items())] = sample.value
    return found


@pytest.fixture
def agent():
    """The address of a node's metrics agent."""
    config = {"metrics_report_interval_ms": 1000}
    ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="ERROR", _system_config=config)
    (node,) = ray.nodes()
    yield f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    ray.shutdown()


def test_the_agent_shows_what_metrics_shows(agent, monkeypatch):
    monkeypatch.setattr(ray_metrics, "PUSH_S", 0.2)
    counted = IngressMetrics("m", 4096)

    def collect():
        yield from counted.collect({})
        yield from engine_metrics("m", ENGINES, "replica")

    exporter = RayMetrics(collect)
    exporter.start()
    try:
        for ttft_s in (0.03, 0.3):  # the second while the first is shown
            counted.started(5, SamplingParams())
            counted.first_token(ttft_s)
            counted.finished(Finished("stop", 9, 1.0, 0.4))
            want = parsed(exposition([(counted, ENGINES)]).decode())
            assert len(want) > 150
            deadline = time.monotonic() + 20
            while (shown := parsed(httpx.get(agent).text)) != want:
                assert time.monotonic() < deadline, {key: shown.get(key) for key in want if shown.get(key) != want[key]}
                time.sleep(0.2)
    finally:
        exporter.close()

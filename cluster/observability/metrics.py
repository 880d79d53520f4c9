"""Prometheus metrics of one ingress: vLLM's names with the prefix `octavo:`, and vLLM's buckets.

What the ingress sees of requests (latencies, lengths, ends) is counted here as it happens, in a registry of its own.
What the engines know (queues, KV, token counts) is read from their `EngineStats` at scrape time and kept nowhere.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from octavo.engine.params import SamplingParams
from octavo.engine.types import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# fmt: off
TTFT_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560
)
TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
REQUEST_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
# fmt: on
# Which process has counted: a scraper behind a load balancer reaches now this ingress, now that one.
INGRESS = f"{socket.gethostname()}:{os.getpid()}"
FINISHED_REASONS = ("stop", "length", "abort", "error")


def token_buckets(longest: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50 … up to `longest`."""
    steps = (lead * 10**power for power in range(len(str(longest)) + 1) for lead in (1, 2, 5))
    return tuple(step for step in steps if step <= longest)


@dataclass(frozen=True, slots=True)
class Finished:
    """A sequence, or a request whose sequences all ended alike, at its end. Times in seconds."""

    reason: str
    generation_tokens: int
    e2e_s: float
    decode_s: float  # first token to last


class IngressMetrics:
    """Counts what passes through one ingress. Not thread-safe beyond what prometheus_client is.

    `others`: registries of parts of the ingress that count for themselves; shown with the rest.
    """

    def __init__(self, model_name: str, max_model_len: int, others: Sequence[CollectorRegistry] = ()) -> None:
        self.registry = CollectorRegistry()
        self._registries = (self.registry, *others)
        self._model_name = model_name
        lengths = token_buckets(max_model_len)
        self._success = self._counter("request_success", "Finished requests, by reason.", "finished_reason")
        self._success_by = {reason: self._success.labels(model_name, reason) for reason in FINISHED_REASONS}
        self._rejections = self._counter("admission_rejections", "Requests refused for lack of capacity.", "reason")
        self._ignored = self._counter(
            "ignored_request_fields", "Request fields that nobody knows and that had no effect."
        )
        self._ttft = self._histogram("time_to_first_token_seconds", "Arrival to first token.", TTFT_S)
        self._itl = self._histogram("inter_token_latency_seconds", "Gap between two successive tokens.", TOKEN_S)
        self._tpot = self._histogram(
            "request_time_per_output_token_seconds", "(last - first token time) / (tokens - 1), per request.", TOKEN_S
        )
        self._e2e = self._histogram("e2e_request_latency_seconds", "Arrival to end.", REQUEST_S)
        self._prompt = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", lengths)
        self._generation = self._histogram("request_generation_tokens", "Tokens generated for a request.", lengths)
        self._n = self._histogram("request_params_n", "The request's n.", (1, 2, 5, 10, 20))
        self._max_tokens = self._histogram("request_params_max_tokens", "The request's max_tokens.", lengths)

    def started(self, prompt_tokens: int, params: SamplingParams) -> None:
        self._prompt.observe(prompt_tokens)
        self._n.observe(params.n)
        if params.max_tokens is not None:
            self._max_tokens.observe(params.max_tokens)

    def pooled(self, reason: str, prompt_tokens: int, e2e_s: float) -> None:
        """A prompt that nothing was generated from is done, or is not to be."""
        self._prompt.observe(prompt_tokens)
        self._success_by[reason].inc()
        self._e2e.observe(e2e_s)

    def first_token(self, ttft_s: float) -> None:
        self._ttft.observe(ttft_s)

    def next_tokens(self, gap_s: float, tokens: int) -> None:
        """`tokens` tokens came together, `gap_s` after the last one."""
        for _ in range(tokens):
            self._itl.observe(gap_s / tokens)

    def finished(self, end: Finished) -> None:
        self._success_by[end.reason].inc()
        self._e2e.observe(end.e2e_s)
        self._generation.observe(end.generation_tokens)
        if end.generation_tokens > 1:
            self._tpot.observe(end.decode_s / (end.generation_tokens - 1))

    def rejected(self, reason: str) -> None:
        self._rejections.labels(self._model_name, reason).inc()

    def ignored_fields(self, count: int) -> None:
        self._ignored.labels(self._model_name).inc(count)

    def collect(self, engines: Mapping[str, EngineStats]) -> Iterator[Metric]:
        """All metrics; `engines` is a snapshot of each replica, by its id."""
        for metric in chain.from_iterable(registry.collect() for registry in self._registries):
            metric.samples = [
                sample._replace(labels={**sample.labels, "ingress": INGRESS}) for sample in metric.samples
            ]
            yield metric
        yield from engine_metrics(self._model_name, engines)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"octavo:{name}", text, ("model_name", *labels), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Iterable[float]) -> Histogram:
        histogram = Histogram(f"octavo:{name}", text, ("model_name",), registry=self.registry, buckets=tuple(buckets))
        return histogram.labels(self._model_name)


def exposition(models: Iterable[tuple[IngressMetrics, Mapping[str, EngineStats]]]) -> bytes:
    """The metrics of all models in Prometheus' text format, each family once."""
    families: dict[str, Metric] = {}
    for metrics, engines in models:
        for metric in metrics.collect(engines):
            if metric.name in families:
                families[metric.name].samples.extend(metric.samples)
            else:
                families[metric.name] = metric
    return generate_latest(_Families(families.values()))


class _Families(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families


def engine_metrics(model_name: str, engines: Mapping[str, EngineStats], label: str = "engine") -> Iterator[Metric]:
    """The replicas' own numbers; what is called `label` is the replica's id."""
    for kind, name, text, value in _ENGINE:
        family = kind(f"octavo:{name}", text, labels=("model_name", label))
        for replica, stats in engines.items():
            family.add_metric((model_name, replica), getattr(stats, value))
        yield family


# (kind, name, description, attribute of EngineStats)
_ENGINE: tuple[tuple[type[GaugeMetricFamily] | type[CounterMetricFamily], str, str, str], ...] = (
    (GaugeMetricFamily, "num_requests_running", "Sequences being computed.", "num_running"),
    (GaugeMetricFamily, "num_requests_waiting", "Sequences waiting.", "num_waiting"),
    (GaugeMetricFamily, "num_tokens_waiting", "Prompt tokens of waiting sequences.", "waiting_tokens"),
    (GaugeMetricFamily, "kv_cache_usage_perc", "Part of the KV pool held, 0 to 1.", "kv_usage"),
    (GaugeMetricFamily, "kv_blocks", "KV blocks of the pool.", "kv_blocks_total"),
    (CounterMetricFamily, "prefix_cache_queries", "Tokens looked up in the prefix cache.", "prefix_queries"),
    (CounterMetricFamily, "prefix_cache_hits", "Tokens found in the prefix cache.", "prefix_hits"),
    (CounterMetricFamily, "num_preemptions", "Preemptions.", "preemptions"),
    (CounterMetricFamily, "prompt_tokens", "Prompt tokens processed.", "prompt_tokens"),
    (CounterMetricFamily, "generation_tokens", "Tokens generated.", "generation_tokens"),
    (CounterMetricFamily, "engine_steps", "Steps of the engine.", "steps"),
    (CounterMetricFamily, "engine_step_seconds", "Time that the ranks worked on steps.", "step_s"),
    (CounterMetricFamily, "engine_gap_seconds", "Time that the ranks waited for a planned step.", "gap_s"),
)

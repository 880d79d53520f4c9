"""Prometheus metrics of one model's router at one ingress."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

DECISION_S = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 1e-1)


class RoutingMetrics:
    """Has a registry of its own: what is shown together is the business of whoever shows it. Thread-safe."""

    def __init__(self, model_name: str = "") -> None:
        self.registry = CollectorRegistry()
        self._decision = Histogram(
            "octavo:routing_decision_seconds",
            "Time to rank the replicas for a request, hashing of its prompt included.",
            ("model_name",),
            registry=self.registry,
            buckets=DECISION_S,
        ).labels(model_name)
        self._predicted = self._counter(
            "routing_hit_tokens_predicted", "Prompt tokens that routed requests should find cached.", model_name
        )
        self._found = self._counter(
            "routing_hit_tokens_found", "Prompt tokens that these requests did find cached.", model_name
        )

        self._resumptions = self._counter(
            "request_resumptions", "Requests submitted again because their replica was lost or had to stop.", model_name
        )

    def decided(self, seconds: float) -> None:
        self._decision.observe(seconds)

    def found(self, predicted: int, found: int) -> None:
        """A request that was expected to find `predicted` prompt tokens cached has found `found`."""
        self._predicted.inc(predicted)
        self._found.inc(found)

    def resumed(self) -> None:
        self._resumptions.inc()

    def _counter(self, name: str, text: str, model_name: str) -> Counter:
        return Counter(f"octavo:{name}", text, ("model_name",), registry=self.registry).labels(model_name)

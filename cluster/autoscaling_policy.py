"""The Autoscaler as a policy of Ray Serve's, which calls it in its controller about ten times a second.

Serve collects what replicas say of themselves (`EngineReplica.record_autoscaling_stats`) and knows how many requests
wait in ingresses; of its own delays, factors and averages none is used.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy
from ray.util.metrics import Gauge

from octavo.cluster.autoscaling import Autoscaler, Sample, load_of
from octavo.cluster.capacity import at_start
from octavo.cluster.config import Autoscaling, ModelConfig
from octavo.cluster.logs import show_logs

logger = logging.getLogger("octavo.autoscaling")

# How often replicas report at most; within a look-back period they do so a few times.
REPORT_S = 2.0
REPORTS_PER_PERIOD = 5
# Between two looks at the load.
LOOK_S = 0.5
METRICS = tuple(item.name for item in fields(Sample) if item.name != "at")


class Policy:
    """Serve makes one per deployment, and a new one when the deployment changes. `settings`: of Autoscaling."""

    def __init__(self, model: str, log_level: str, **settings: Any) -> None:
        show_logs(log_level)
        self._model = model
        self._autoscaler = Autoscaler(Autoscaling(**settings))
        self._looked_at = 0.0
        self._target = -1
        self._wanted = Gauge(
            "octavo_autoscaling_wanted_replicas",
            "Replicas that a signal asks for; 0 = it asks for nothing. The most that is asked for decides.",
            tag_keys=("deployment", "signal"),
        )

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        now, target = ctx.current_time or 0.0, ctx.target_num_replicas
        if now - self._looked_at < LOOK_S and target == self._target:
            return target, {}
        self._looked_at, self._target = now, target
        load = load_of(samples_of(ctx.raw_metrics or {}), ctx.total_queued_requests)
        decision = self._autoscaler.decide(load, target, now)
        wanted = self._autoscaler.wanted
        for signal in ("queue", "kv", "ttft"):
            self._wanted.set(getattr(wanted, signal), {"deployment": ctx.deployment_name, "signal": signal})
        if decision.replicas != target:
            logger.info("%s: %d → %d replicas: %s", self._model, target, decision.replicas, decision.reason)
        return decision.replicas, {}


def serve_config(model: ModelConfig, settings: Autoscaling, log_level: str) -> AutoscalingConfig:
    """Serve's settings for `model`, which is autoscaled by `settings`."""
    policy = AutoscalingPolicy(  # type: ignore[no-untyped-call]
        policy_function="octavo.cluster.autoscaling_policy:Policy",
        policy_kwargs={"model": model.name, "log_level": log_level, **asdict(settings)},
    )
    with warnings.catch_warnings():
        # Ray 2.60 warns that metrics_interval_s will become an environment variable; there is none per deployment yet.
        warnings.simplefilter("ignore", DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=settings.min_replicas,
            max_replicas=settings.max_replicas,
            initial_replicas=at_start(model),
            look_back_period_s=settings.look_back_period_s,
            metrics_interval_s=min(REPORT_S, settings.look_back_period_s / REPORTS_PER_PERIOD),
            upscale_delay_s=0,
            downscale_delay_s=0,
            downscale_to_zero_delay_s=0,
            policy=policy,
        )


def samples_of(raw: Mapping[str, Mapping[Any, Any]]) -> list[list[Sample]]:
    """From Serve's series by metric and replica: the samples of each replica that has told all."""
    found = []
    for replica, times in raw.get(METRICS[0], {}).items():
        series = [raw.get(name, {}).get(replica, ()) for name in METRICS]
        rows = zip(*series, strict=False)
        found.append(
            [Sample(at.timestamp, *(point.value for point in row)) for at, row in zip(times, rows, strict=False)]
        )
    return found

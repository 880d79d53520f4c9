"""DeploymentConfig: everything one deployment is made of, as one frozen value read from YAML. No Ray here, no torch.

`octavo serve MODEL` is this file with defaults; a Serve config's `args` are its mapping:

    api_key: [secret]
    models:
      - model: smollm2-135m
        num_replicas: 2
        engine: {max_model_len: 4096}
      - model: org/bigger
        engine: {tensor_parallel_size: 4}

A deployment of one model may write the model's settings at the top, without `models`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from octavo.cluster.ingress.reading.formats import call_format, thinking
from octavo.cluster.ingress.settings import MIB
from octavo.cluster.values import parse_bytes, read_yaml, section, typed
from octavo.engine.config import EngineConfig
from octavo.engine.errors import ConfigError

__all__ = [
    "SERVING_DEFAULTS",
    "Autoscaling",
    "DeploymentConfig",
    "Limits",
    "ModelConfig",
    "Routing",
    "parse_bytes",
    "read_yaml",
]

# What a server sets otherwise than a bare engine: nothing may queue without bound.
SERVING_DEFAULTS: Mapping[str, Any] = {"max_num_queued_reqs": 1024}


def _above_zero(name: str, value: float | None) -> None:
    if value is not None and not value > 0:
        raise ConfigError(f"{name} must be above 0, got {value}.")


@dataclass(frozen=True, slots=True)
class Limits:
    """What one ingress accepts. None = no limit but the engine's own.

    max_body_bytes: longest request body. max_prompt_tokens: longest prompt. max_choices: prompts × n of one request.
    max_ongoing_requests: requests in progress at one ingress.
    max_queue_wait_s: a request that would wait longer for its turn, at every replica, gets 429 at once, with the time
        after which to try again. request_timeout_s: age at which a request is ended.
    max_stored_bytes: of responses that one ingress keeps for previous_response_id; 0 = none.
    """

    max_body_bytes: int = 32 * MIB
    max_prompt_tokens: int | None = None
    max_choices: int = 2048
    max_ongoing_requests: int | None = None
    max_queue_wait_s: float | None = 30.0
    request_timeout_s: float | None = None
    max_stored_bytes: int = 64 * MIB

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            if item.name != "max_stored_bytes":
                _above_zero(f"limits.{item.name}", getattr(self, item.name))
        if self.max_stored_bytes < 0:
            raise ConfigError(f"limits.max_stored_bytes must be at least 0, got {self.max_stored_bytes}.")


@dataclass(frozen=True, slots=True)
class Routing:
    """Which replica gets a request.

    policy: prefix = where the longest part of the prompt is cached, weighed against load; least_loaded; round_robin; or
        `package.module:Class` of one's own. session_header: requests with the same value of this header stay together.
    max_index_blocks: KV blocks whose whereabouts an ingress remembers.
    failover_timeout_s: how long a request whose replica was lost may wait for another one.
    """

    policy: str = "prefix"
    session_header: str = "x-session-id"
    max_index_blocks: int = 1 << 20
    failover_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if self.policy not in ("prefix", "least_loaded", "round_robin") and ":" not in self.policy:
            raise ConfigError(
                "routing.policy must be prefix, least_loaded, round_robin or package.module:Class, "
                f"got {self.policy!r}."
            )
        _above_zero("routing.max_index_blocks", self.max_index_blocks)
        _above_zero("routing.failover_timeout_s", self.failover_timeout_s)


@dataclass(frozen=True, slots=True)
class Autoscaling:
    """Between how many replicas a model moves, and what moves it. Times in seconds.

    min_replicas 0: the model goes away when nobody asks for it; the next request waits until it is back.
    initial_replicas: at the start; None = min_replicas, but at least one.
    target_queued_tokens: prompt tokens waiting per replica. target_kv_usage: part of the KV pool in use, 0 to 1.
        target_ttft_s: time to first token; None = not looked at. Each is the load at which a replica counts as full:
        the most loaded of the three decides.
    upscale_delay_s, downscale_delay_s: how long more, or fewer, replicas must have been wanted without a break.
        downscale_to_zero_delay_s: from one to none; None = downscale_delay_s.
    look_back_period_s: over which the signals are averaged.
    start_timeout_s: how long a request may wait for the first replica of a model that had gone away.
    """

    min_replicas: int = 1
    max_replicas: int = 1
    initial_replicas: int | None = None
    target_queued_tokens: float = 4096.0
    target_kv_usage: float = 0.8
    target_ttft_s: float | None = None
    upscale_delay_s: float = 10.0
    downscale_delay_s: float = 300.0
    downscale_to_zero_delay_s: float | None = None
    look_back_period_s: float = 10.0
    start_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if self.min_replicas < 0:
            raise ConfigError(f"autoscaling.min_replicas must not be negative, got {self.min_replicas}.")
        if self.max_replicas < max(1, self.min_replicas):
            raise ConfigError(
                f"autoscaling.max_replicas ({self.max_replicas}) must be at least 1 and min_replicas "
                f"({self.min_replicas})."
            )
        if self.initial_replicas is not None and not self.min_replicas <= self.initial_replicas <= self.max_replicas:
            raise ConfigError(
                f"autoscaling.initial_replicas ({self.initial_replicas}) must lie between min_replicas "
                f"({self.min_replicas}) and max_replicas ({self.max_replicas})."
            )
        for name in ("target_queued_tokens", "target_kv_usage", "target_ttft_s"):
            _above_zero(f"autoscaling.{name}", getattr(self, name))
        for name in ("look_back_period_s", "start_timeout_s"):
            _above_zero(f"autoscaling.{name}", getattr(self, name))
        if self.target_kv_usage > 1:
            raise ConfigError(f"autoscaling.target_kv_usage must be at most 1, got {self.target_kv_usage}.")
        for name in ("upscale_delay_s", "downscale_delay_s", "downscale_to_zero_delay_s"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"autoscaling.{name} must not be negative.")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One model and its pool of replicas.

    engine: one replica. served_model_name: names that requests may use; empty = the model's own.
    pattern: the topology; `replicated` = equal replicas, each of which computes whole requests.
    num_replicas: how many, unless autoscaling says.
    placement: of a replica's ranks on nodes, as Ray's placement groups know it; auto = on one node, but the stages of a
        pipeline may lie on several.
    num_cpus: CPUs that Ray reserves for each rank of a replica; on a cluster started elsewhere also the threads a rank
        computes with.
    drain_timeout_s: how long a replica that is to stop may go on with the requests it has; then others take them over.
    max_surge_percent: while another version is rolled out, so many replicas of num_replicas, rounded up, may run beyond
        it: new ones are up before old ones go. 0 = old ones go first, for where there is no room for both.
    step_timeout_s: a replica that finishes no step for so long, though there is work, is replaced. Must be above the
        longest step there can be. hang_timeout_s: the same for a process that shows no sign of life at all.
    chat_template: Jinja source in place of the model's own, or a file with it.
    tool_call_parser: how the model writes calls of tools; reasoning_parser: how it marks its thoughts. None = what its
        preset or its chat template shows; "none" = not at all. enable_auto_tool_choice: calls that the model makes of
        its own accord are read; without, they stay text.
    """

    engine: EngineConfig = field(default_factory=lambda: EngineConfig(**SERVING_DEFAULTS))
    served_model_name: tuple[str, ...] = ()
    pattern: Literal["replicated"] = "replicated"
    num_replicas: int = 1
    placement: Literal["auto", "pack", "strict_pack", "spread", "strict_spread"] = "auto"
    num_cpus: float = 1.0
    drain_timeout_s: float = 60.0
    max_surge_percent: int = 25
    step_timeout_s: float = 300.0
    hang_timeout_s: float = 4.0
    chat_template: str | None = None
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    enable_auto_tool_choice: bool = True
    routing: Routing = Routing()
    autoscaling: Autoscaling | None = None

    def __post_init__(self) -> None:
        _above_zero("num_replicas", self.num_replicas)
        _above_zero("step_timeout_s", self.step_timeout_s)
        _above_zero("hang_timeout_s", self.hang_timeout_s)
        if self.num_cpus < 0 or self.drain_timeout_s < 0:
            raise ConfigError("num_cpus and drain_timeout_s must not be negative.")
        if not 0 <= self.max_surge_percent <= 100:
            raise ConfigError(f"max_surge_percent must be 0 to 100, got {self.max_surge_percent}.")
        if self.tool_call_parser is not None:
            call_format(self.tool_call_parser)
        if self.reasoning_parser is not None:
            thinking(self.reasoning_parser)
        if not all(self.served_model_name):
            raise ConfigError("A served model name must not be empty.")

    @property
    def name(self) -> str:
        """What the model is called before anything of it has been opened."""
        if self.served_model_name:
            return self.served_model_name[0]
        if self.engine.is_fake:
            return "fake"
        return re.split(r"[/\\]", self.engine.model.rstrip("/\\"))[-1].removesuffix(".gguf")

    @property
    def may_be_away(self) -> bool:
        """Whether there is no replica at times, because nobody asks for the model."""
        return self.autoscaling is not None and self.autoscaling.min_replicas == 0

    @property
    def placement_strategy(self) -> str:
        """Ray's name of it. Tensor-parallel ranks exchange something in every layer: not over a network unasked."""
        if self.placement == "auto":
            return "STRICT_PACK" if self.engine.pipeline_parallel_size == 1 else "PACK"
        return self.placement.upper()

    @property
    def max_replicas(self) -> int:
        return self.num_replicas if self.autoscaling is None else self.autoscaling.max_replicas

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], prefix: str = "") -> ModelConfig:
        """`model` stands beside `engine`, not in it. Raises ConfigError."""
        values = dict(values)
        engine = section(values.pop("engine", None), f"{prefix}engine")
        if "model" in engine:
            raise ConfigError(f"{prefix}engine.model belongs one level up: write {prefix}model instead.")
        if "model" in values:
            engine["model"] = values.pop("model")
        values["engine"] = typed(EngineConfig, {**SERVING_DEFAULTS, **engine}, f"{prefix}engine.")
        return typed(cls, values, prefix)


MODEL_SETTINGS = ("model", *(item.name for item in dataclasses.fields(ModelConfig)))


@dataclass(frozen=True, slots=True)
class DeploymentConfig:
    """Models and their common front. Names of models are unique.

    api_key: keys of which clients must send one; empty = open to all.
    otlp_traces_endpoint: URL of an OTLP/HTTP receiver, for OpenTelemetry traces of requests; None = no traces.
    num_ingresses: processes that speak HTTP and gRPC. ingress_drain_timeout_s: how long one that is to stop may go on
        with the streams it has; a connection cannot be handed over.
    """

    models: tuple[ModelConfig, ...] = (ModelConfig(),)
    api_key: tuple[str, ...] = ()
    limits: Limits = Limits()
    num_ingresses: int = 1
    ingress_drain_timeout_s: float = 3600.0
    trust_request_chat_template: bool = False
    allowed_origins: tuple[str, ...] = ("*",)
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    otlp_traces_endpoint: str | None = None

    def __post_init__(self) -> None:
        if not all(self.api_key):
            raise ConfigError("An API key must not be empty.")
        endpoint = self.otlp_traces_endpoint
        if endpoint is not None and not re.match(r"https?://[^/]", endpoint):
            raise ConfigError(f"otlp_traces_endpoint must be the URL of an OTLP/HTTP receiver, got {endpoint!r}.")
        _above_zero("num_ingresses", self.num_ingresses)
        _above_zero("ingress_drain_timeout_s", self.ingress_drain_timeout_s)
        if not self.models:
            raise ConfigError("models must name at least one model.")
        names = [name for model in self.models for name in model.served_model_name or (model.name,)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"{twice[0]!r} is the name of two models: set served_model_name.")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> DeploymentConfig:
        """From YAML's mapping. Raises ConfigError, naming the key, for what is unknown or of the wrong type."""
        values = section(values, "")
        at_top = {key: values.pop(key) for key in MODEL_SETTINGS if key in values}
        listed = values.pop("models", None)
        models: tuple[ModelConfig, ...]
        if listed is None:
            models = (ModelConfig.from_mapping(at_top),)
        elif at_top:
            raise ConfigError(f"{next(iter(at_top))} belongs to a model: write it below models.")
        elif not isinstance(listed, list):
            raise ConfigError("models must be a list.")
        else:
            models = tuple(
                ModelConfig.from_mapping(section(item, f"models[{i}]"), f"models[{i}].")
                for i, item in enumerate(listed)
            )
        known = [item.name for item in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                settings = ", ".join((*known, *MODEL_SETTINGS))
                raise ConfigError(f"{key} is not a setting; there are {settings}.")
        return dataclasses.replace(typed(cls, values), models=models)

    @classmethod
    def from_file(cls, path: Path) -> DeploymentConfig:
        """Raises ConfigError if the file cannot be read, is no YAML mapping, or holds what cannot be."""
        return cls.from_mapping(read_yaml(path))

"""Rollout: from the configuration that runs to another. What has to start anew, and what changes in place. Pure.

A deployment's version is a digest of what its processes are made of. Serve restarts replicas of another version and
leaves the others alone, so deploying the same file twice changes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from typing import Any, Literal

from octavo.cluster.config import DeploymentConfig, ModelConfig

# What the processes of an engine never see: Serve, the routers and the ingress use it.
NOT_IN_ENGINES = (
    *("served_model_name", "num_replicas", "routing", "autoscaling", "max_surge_percent"),
    *("chat_template", "tool_call_parser", "reasoning_parser", "enable_auto_tool_choice"),
)
# What the ingress never sees: the rest of each model, and of the deployment, shapes its answers.
NOT_IN_INGRESSES = ("num_replicas", "num_cpus", "max_surge_percent", "autoscaling")


@dataclass(frozen=True, slots=True)
class Change:
    """What happens to one deployment. why: the settings that differ, as (name, before, after)."""

    deployment: str
    kind: Literal["new", "restart", "in place", "removed", "unchanged"]
    why: tuple[tuple[str, str, str], ...] = ()


def engine_version(model: ModelConfig, log_level: str) -> str:
    return _digest(_without(model, NOT_IN_ENGINES), log_level)


def ingress_version(config: DeploymentConfig) -> str:
    models = tuple(_without(model, NOT_IN_INGRESSES) for model in config.models)
    away = tuple(m.autoscaling.start_timeout_s for m in config.models if m.autoscaling and m.may_be_away)
    return _digest(models, away, replace(config, models=(ModelConfig(),), num_ingresses=1))


def compare(
    before: DeploymentConfig | None, after: DeploymentConfig, name_of: Callable[[ModelConfig], str]
) -> list[Change]:
    """The ingress's change, then the engines'. name_of: what a model's deployment is called. before None: nothing runs
    yet, or nothing that is understood.
    """
    if before is None:
        return [Change("ingress", "new"), *(Change(name_of(model), "new") for model in after.models)]
    restarts = ingress_version(before) != ingress_version(after)
    differing = _settings(before, after, ("models",))
    changes = [Change("ingress", "restart" if restarts else "in place" if differing else "unchanged", differing)]
    old = {name_of(model): model for model in before.models}
    for model in after.models:
        name = name_of(model)
        was = old.pop(name, None)
        if was is None:
            changes.append(Change(name, "new"))
            continue
        why = _settings(was, model)
        anew = engine_version(was, before.log_level) != engine_version(model, after.log_level)
        changes.append(Change(name, "restart" if anew else "in place" if why else "unchanged", why))
    return [*changes, *(Change(name, "removed") for name in old)]


def _without(model: ModelConfig, names: tuple[str, ...]) -> ModelConfig:
    """`model` with the defaults of some settings."""
    return replace(model, **{name: getattr(_DEFAULTS, name) for name in names})


def _digest(*parts: Any) -> str:
    """Of frozen dataclasses, whose repr is their whole content."""
    return hashlib.sha256(repr((version("octavo"), *parts)).encode()).hexdigest()[:16]


def _settings(before: Any, after: Any, leave_out: tuple[str, ...] = ()) -> tuple[tuple[str, str, str], ...]:
    """The fields that differ; of one that is a dataclass in both, its own."""
    found: list[tuple[str, str, str]] = []
    for field in fields(before):
        old, new = getattr(before, field.name), getattr(after, field.name)
        if field.name in leave_out or old == new:
            continue
        if hasattr(old, "__dataclass_fields__") and hasattr(new, "__dataclass_fields__"):
            found += [(f"{field.name}.{name}", was, now) for name, was, now in _settings(old, new)]
        elif field.name == "api_key":
            found.append((field.name, f"{len(old)} keys", f"{len(new)} keys"))
        else:
            found.append((field.name, str(old), str(new)))
    return tuple(found)


_DEFAULTS = ModelConfig()

"""Does a configuration fit a cluster? Counts of GPUs and CPUs; pure, so that it is known before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from octavo.cluster.config import ModelConfig


@dataclass(frozen=True, slots=True)
class NodeResources:
    """What Ray was told that one node has."""

    gpus: float
    cpus: float


def shortage(models: Sequence[ModelConfig], nodes: Sequence[NodeResources]) -> str | None:
    """What `models` need at the start and `nodes` do not have, in one sentence; None = nothing.

    A cluster that is still growing has less than it will have: who scales nodes up on demand should not take this for
    more than a warning.
    """
    if not nodes:
        return "The cluster has no node."
    gpus, cpus = sum(node.gpus for node in nodes), sum(node.cpus for node in nodes)
    most_cpus = max(node.cpus for node in nodes)
    for model in models:
        if model.num_cpus > most_cpus:
            return (
                f"A rank of {model.name} wants {model.num_cpus:g} CPUs, but no node has more than {most_cpus:g}: "
                f"lower num_cpus."
            )
    on_gpu = [model for model in models if _on_gpu(model, gpus)]
    need_gpus = sum(_ranks(model) for model in on_gpu)
    if need_gpus > gpus:
        return f"{_counted(on_gpu)} need {need_gpus} GPUs, but the cluster has {gpus:g}."
    need_cpus = sum(_ranks(model) * model.num_cpus for model in models)
    if need_cpus > cpus:
        return f"{_counted(models)} need {need_cpus:g} CPUs, but the cluster has {cpus:g}."
    return None


def at_start(model: ModelConfig) -> int:
    """Replicas of a model at the start."""
    if model.autoscaling is None:
        return model.num_replicas
    if model.autoscaling.initial_replicas is not None:
        return model.autoscaling.initial_replicas
    return max(1, model.autoscaling.min_replicas)


def _on_gpu(model: ModelConfig, gpus: float) -> bool:
    device = model.engine.device
    return device == "cuda" or (device == "auto" and gpus >= 1 and not model.engine.is_fake)


def _ranks(model: ModelConfig) -> int:
    return at_start(model) * model.engine.num_ranks


def _counted(models: Sequence[ModelConfig]) -> str:
    parts = []
    for model in models:
        ranks = model.engine.num_ranks
        parts.append(f"{at_start(model)} × {model.name}" + (f" with {ranks} ranks each" if ranks > 1 else ""))
    return f"The replicas ({', '.join(parts)})"

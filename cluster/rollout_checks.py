"""What is wrong with a configuration, as far as it can be known before the running application is touched."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from octavo.cluster.capacity import NodeResources, shortage
from octavo.cluster.config import DeploymentConfig, ModelConfig
from octavo.cluster.values import read_yaml, section
from octavo.engine.errors import ConfigError

IMPORT_PATH = "octavo.cluster.app:build_app"
NODES_S = 30.0  # for the nodes to look at the models' files


def read_deployment(path: Path) -> DeploymentConfig:
    """A deployment YAML, or a Serve config with one application of ours. Raises ConfigError."""
    return DeploymentConfig.from_mapping(own_part(read_yaml(path), path.name))


def own_part(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The deployment's mapping in a Serve config; of anything else, itself."""
    if "applications" not in values:
        return values
    listed = values["applications"]
    apps = [section(app, "applications") for app in listed] if isinstance(listed, list) else []
    ours = [app for app in apps if app.get("import_path") == IMPORT_PATH]
    if len(ours) != 1:
        raise ConfigError(f"{name} must hold one application with import_path {IMPORT_PATH}, it holds {len(ours)}.")
    return section(ours[0].get("args"), "args")


def check(config: DeploymentConfig) -> list[str]:
    """Raises ConfigError for what cannot run on the cluster this process has joined; returns what may not."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    given = [NodeResources(n["Resources"].get("GPU", 0.0), n["Resources"].get("CPU", 0.0)) for n in nodes]
    lacking = shortage(config.models, given)
    if lacking is not None:
        raise ConfigError(lacking)
    working = [node for node, has in zip(nodes, given, strict=True) if has.cpus or has.gpus]
    return [warning for model in config.models for warning in _check_model(model, working)]


def check_here(model: ModelConfig) -> str | None:
    """Why a model in a folder or file cannot be served from where this runs; None = nothing is known against it."""
    from octavo.cluster.doctor.here import model_files
    from octavo.engine.models.fits import check_layout
    from octavo.engine.parallel.layout import Layout

    path = Path(model.engine.model).expanduser()
    if (error := model_files(str(path)).error) is not None:
        return f"{path} cannot be read: {error}"
    config = path / "config.json"
    if config.is_file() and model.engine.num_ranks > 1:
        values = json.loads(config.read_text())
        shape = SimpleNamespace(**(values.get("text_config") or values))
        if hasattr(shape, "num_hidden_layers") and hasattr(shape, "num_attention_heads"):
            try:
                check_layout(shape, Layout(model.engine.tensor_parallel_size, model.engine.pipeline_parallel_size))
            except ConfigError as error:
                return f"{model.name}: {error}"
    return None


def is_path(name: str) -> bool:
    """Not a preset's name or a hub id, which every node finds for itself."""
    return name.startswith(("/", ".", "~")) or Path(name).exists()


def _check_model(model: ModelConfig, nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    name = model.engine.model
    if model.engine.is_fake:
        return []
    if not is_path(name):
        _check_name(name, shapes=model.engine.load_format == "dummy")
        return []
    faults = _ask(model, nodes)
    if faults and len(faults) == len(nodes):
        raise ConfigError(f"{next(iter(faults.values())).rstrip('.')}, on any node.")
    return [f"On node {node}, {fault.rstrip('.')}: no replica can run there." for node, fault in faults.items()]


def _check_name(name: str, shapes: bool) -> None:
    """Raises ConfigError for what is no preset, no shape (if they count), and cannot be on the hub. Asks no network."""
    from octavo.engine.loader.presets import load_presets
    from octavo.engine.loader.source import resolve_model

    if name not in load_presets() and "/" not in name:
        resolve_model(name, shapes=shapes)  # has the sentence


def _ask(model: ModelConfig, nodes: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Address → fault, of the nodes that have one. A node that does not answer in time is not blamed for the model."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(check_here)
    calls = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(model): node
        for node in nodes
    }
    ready, _ = ray.wait(list(calls), num_returns=len(calls), timeout=NODES_S)
    faults = {}
    for call in ready:
        try:
            fault = ray.get(call)
        except RayError:
            continue
        if fault is not None:
            faults[calls[call]["NodeManagerAddress"] + f" {calls[call]['NodeID'][:6]}"] = fault
    return faults

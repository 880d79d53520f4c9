"""From a DeploymentConfig to the Serve application: ingress → engine. A Serve config's import_path.

applications:
  - name: octavo
    import_path: octavo.cluster.app:build_app
    args: {model: smollm2-135m}
"""

from __future__ import annotations

import asyncio
import importlib
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from octavo.cluster.config import DeploymentConfig
from octavo.cluster.ingress.settings import IngressSettings
from octavo.cluster.logs import show_logs
from octavo.cluster.replica import EngineReplica, OnDeltas
from octavo.cluster.routing.client import ServeEngineClient
from octavo.cluster.token_receiver import TokenReceiver
from octavo.engine.config import EngineConfig
from octavo.engine.errors import ConfigError

if TYPE_CHECKING:
    from octavo.engine.text.tokenizer import Tokenizer

APP = "octavo"
INGRESS = "ingress"
ENGINE = "engine"
# The engine queues and refuses (max_num_queued_reqs); Serve's own counters only have to stay out of its way.
MAX_ONGOING = 1 << 16
# Requests that may wait in an ingress for a replica to be there at all.
MAX_WAITING_FOR_REPLICA = 1024
# An ingress outlives the engines' deadline by this, to tell its clients what became of their requests.
INGRESS_MARGIN_S = 10.0


class EngineHost(EngineReplica):
    """Builds the engine of one replica."""

    async def __init__(self, config: DeploymentConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        from octavo.engine.build import build_engine
        from octavo.engine.loop import EngineLoop

        show_logs(config.log_level)
        import_s = await asyncio.to_thread(_import_engine, config.engine)
        engine = await asyncio.to_thread(build_engine, config.engine)
        info = replace(engine.info, phases=(("import torch", import_s), *engine.info.phases))
        replica_id = serve.get_replica_context().replica_id.unique_id

        def start(on_deltas: OnDeltas) -> EngineLoop:
            return EngineLoop(engine.core, on_deltas)

        super().__init__(replica_id, info, start, config.step_timeout_s)

    async def __del__(self) -> None:
        if hasattr(self, "_loop"):
            await self.close()


@serve.ingress()
class IngressHost:
    """Builds the HTTP application of one ingress."""

    def __init__(self, config: DeploymentConfig, engine: DeploymentHandle[Any]) -> None:
        show_logs(config.log_level)
        self._config = config
        self._engine = engine
        self._receiver = TokenReceiver()

    async def __serve_build_asgi_app__(self) -> Any:
        from octavo.cluster.ingress.app import create_app

        await self._receiver.start(node_address())
        client = ServeEngineClient(self._engine, self._receiver)
        name, tokenizer = await asyncio.to_thread(load_text, self._config.engine)
        return create_app(ingress_settings(self._config, name), client, tokenizer)

    async def __del__(self) -> None:
        if hasattr(self, "_receiver"):
            await self._receiver.stop()


def build_app(args: DeploymentConfig | Mapping[str, Any]) -> Application:
    """The application of `args`, a DeploymentConfig or its mapping. Raises ConfigError."""
    config = args if isinstance(args, DeploymentConfig) else DeploymentConfig.from_mapping(args)
    logs = LoggingConfig(enable_access_log=False, log_level="WARNING")  # of Serve's own; ours say more
    engine = serve.deployment(
        name=ENGINE,
        num_replicas=config.num_replicas,
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": _num_gpus(config.engine)},
        max_ongoing_requests=MAX_ONGOING,
        max_queued_requests=MAX_WAITING_FOR_REPLICA,
        graceful_shutdown_timeout_s=config.drain_timeout_s,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5,
        health_check_timeout_s=30,
        max_constructor_retry_count=3,
        logging_config=logs,
    )(EngineHost)
    ingress = serve.deployment(
        name=INGRESS,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=MAX_ONGOING,
        graceful_shutdown_timeout_s=config.drain_timeout_s + INGRESS_MARGIN_S,
        graceful_shutdown_wait_loop_s=0.5,
        max_constructor_retry_count=3,
        logging_config=logs,
    )(IngressHost)
    return ingress.bind(config, engine.bind(config))


def _import_engine(config: EngineConfig) -> float:
    """Import what building the engine needs; returns the seconds that took."""
    started = time.perf_counter()
    if config.model != "fake":
        importlib.import_module("octavo.engine.runner.build")
    return time.perf_counter() - started


def ingress_settings(config: DeploymentConfig, model_name: str) -> IngressSettings:
    """`model_name`: what the model is called unless the configuration says otherwise. Raises ConfigError."""
    limits = config.limits
    return IngressSettings(
        served_model_names=config.served_model_name or (model_name,),
        model_source=config.engine.model,
        api_keys=config.api_key,
        max_body_bytes=limits.max_body_bytes,
        max_prompt_tokens=limits.max_prompt_tokens,
        max_choices=limits.max_choices,
        max_ongoing_requests=limits.max_ongoing_requests,
        request_timeout_s=limits.request_timeout_s,
        chat_template=_chat_template(config.chat_template),
        trust_request_chat_template=config.trust_request_chat_template,
        allowed_origins=config.allowed_origins,
    )


def load_text(config: EngineConfig) -> tuple[str, Tokenizer]:
    """(the model's name for clients, its tokenizer). Downloads what is not here. Raises ConfigError."""
    if config.model == "fake":
        from octavo.engine.text.byte_tokenizer import ByteTokenizer

        return "fake", ByteTokenizer()
    from octavo.engine.loader.source import resolve_model
    from octavo.engine.text.tokenizer import load_tokenizer

    model = resolve_model(config.model, revision=config.revision, download_dir=config.download_dir)
    source = model if config.tokenizer is None else resolve_model(config.tokenizer, download_dir=config.download_dir)
    return model.served_model_name, load_tokenizer(source.path, trust_remote_code=config.trust_remote_code)


def node_address() -> str:
    """The address under which the cluster knows this node, and other nodes reach it."""
    here = ray.get_runtime_context().get_node_id()
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    (address,) = (node["NodeManagerAddress"] for node in nodes if node["NodeID"] == here)
    return str(address)


def _chat_template(given: str | None) -> str | None:
    """A Jinja source has braces or line ends; anything else is a file's name."""
    if given is None or any(mark in given for mark in "{}\n"):
        return given
    try:
        return Path(given).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The chat template {given!r} cannot be read: {error}.") from None


def _num_gpus(config: EngineConfig) -> int:
    """Ray shows an actor only the GPUs it asked for."""
    if config.device == "auto" and config.model != "fake":
        return int(ray.is_initialized() and ray.cluster_resources().get("GPU", 0) >= 1)  # type: ignore[no-untyped-call]
    return int(config.device == "cuda")

"""From a DeploymentConfig to the Serve application: ingress → one pool of engines per model. A Serve config's
import_path.

applications:
  - name: octavo
    import_path: octavo.cluster.app:build_app
    args: {model: smollm2-135m}
"""

from __future__ import annotations

import asyncio
import importlib
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from octavo.cluster.autoscaling_policy import serve_config
from octavo.cluster.config import DeploymentConfig, ModelConfig
from octavo.cluster.ingress.grpc.host import RpcHost
from octavo.cluster.ingress_parts import ingress_settings, load_text
from octavo.cluster.logs import show_logs
from octavo.cluster.observability.metrics import engine_metrics
from octavo.cluster.observability.ray_metrics import RayMetrics
from octavo.cluster.observability.routing import RoutingMetrics
from octavo.cluster.observability.traces import make_tracer, require_exporter
from octavo.cluster.replica import EngineReplica, Host, OnDeltas
from octavo.cluster.rollout import engine_version, ingress_version
from octavo.cluster.routing.client import ServeEngineClient
from octavo.cluster.routing.failover import FailoverClient
from octavo.cluster.routing.fleet import Fleet
from octavo.cluster.routing.policies import make_policy
from octavo.cluster.serve_host import came_through_handle, drain_flag, end_process, note_broken
from octavo.cluster.token_receiver import TokenReceiver
from octavo.engine.config import EngineConfig
from octavo.engine.errors import ConfigError
from octavo.engine.process.watchdog import STARTING_S, Watchdog

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from octavo.cluster.ingress.service import Service

APP = "octavo"
INGRESS = "ingress"
# The engine queues and refuses (max_num_queued_reqs); Serve's own counters only have to stay out of its way.
MAX_ONGOING = 1 << 16
# Requests that may wait in an ingress for a replica to be there at all.
MAX_WAITING_FOR_REPLICA = 1024
ROUTER = "octavo.cluster.routing.router.OctavoRequestRouter"
# Of Serve's own; ours say more.
LOGS = LoggingConfig(enable_access_log=False, log_level="WARNING")


class EngineHost(EngineReplica):
    """Builds the engine of one replica."""

    async def __init__(self, model: ModelConfig, log_level: str) -> None:  # type: ignore[misc]  # Serve awaits it
        from octavo.engine.build import RankOptions, build_engine
        from octavo.engine.loop import EngineLoop

        show_logs(log_level)
        # Serve looks at replicas that run, not at those that start: one that is stuck there would be waited for.
        self._watchdog = Watchdog(STARTING_S)
        self._watchdog.start()
        replica_id = serve.get_replica_context().replica_id.unique_id
        options = RankOptions(
            label=f"{engine_name(model)}#{replica_id}",
            hang_timeout_s=model.hang_timeout_s,
            step_timeout_s=model.step_timeout_s,
        )
        phases = await asyncio.to_thread(_import_engine, model.engine)
        engine = await asyncio.to_thread(build_engine, model.engine, options=options)
        info = replace(engine.info, phases=(*phases, *engine.info.phases))

        def start(on_deltas: OnDeltas) -> EngineLoop:
            return EngineLoop(engine.core, on_deltas)

        host = Host(drain_flag(), model.drain_timeout_s, end_process)
        super().__init__(replica_id, info, start, model.step_timeout_s, host)
        await self.first_token()
        name = model.served_model_name[0] if model.served_model_name else info.model
        self._ray_metrics = RayMetrics(lambda: engine_metrics(name, {replica_id: self._loop.stats()}, "replica"))
        self._ray_metrics.start()
        self._watchdog.allow(model.hang_timeout_s)

    async def __del__(self) -> None:
        if hasattr(self, "_watchdog"):
            self._watchdog.close()
        if hasattr(self, "_ray_metrics"):
            self._ray_metrics.close()
        if hasattr(self, "_loop"):
            await self.close()


@serve.ingress()
class IngressHost(RpcHost):
    """Builds the HTTP application of one ingress, and answers its gRPC calls, where Serve takes any.

    `engines[i]` is the pool of `config.models[i]`.
    """

    def __init__(self, config: DeploymentConfig, engines: Sequence[DeploymentHandle[Any]]) -> None:
        show_logs(config.log_level)
        self._config = config
        self._engines = engines
        self._receiver = TokenReceiver(note_broken)
        self._clients: list[ServeEngineClient] = []
        self._tracer = make_tracer(config.otlp_traces_endpoint)

    async def __serve_build_asgi_app__(self) -> Any:
        from octavo.cluster.ingress.app import create_app

        await self._receiver.start(node_address())
        pools = zip(self._config.models, self._engines, strict=True)
        services = [await self._service(model, engine) for model, engine in pools]
        app = create_app(services)
        self._ray_metrics = RayMetrics(lambda: _counted_here(services))
        self._ray_metrics.start()
        self.start_rpc(app.state.catalog, came_through_handle, drain_flag())
        return app

    async def __del__(self) -> None:
        if hasattr(self, "_clients"):
            for client in self._clients:
                await client.close()
            await self._receiver.stop()
        if hasattr(self, "_ray_metrics"):
            self._ray_metrics.close()
        if hasattr(self, "_tracer"):
            await asyncio.to_thread(self._tracer.close)

    async def _service(self, model: ModelConfig, engine: DeploymentHandle[Any]) -> Service:
        from octavo.cluster.ingress.service import Service

        name, tokenizer = await asyncio.to_thread(load_text, model.engine)
        settings = ingress_settings(self._config, model, name)
        metrics = RoutingMetrics(settings.served_model_names[0])
        fleet = Fleet(make_policy(model.routing.policy), model.routing.max_index_blocks, metrics)
        client = ServeEngineClient(engine, self._receiver, fleet)
        client.start(model.may_be_away)
        self._clients.append(client)
        is_stopping = drain_flag()
        lasting = FailoverClient(
            client,
            model.routing.failover_timeout_s,
            metrics.resumed,
            lambda: is_stopping() and not fleet.replicas,  # all of it stops: nobody will come
        )
        return Service(settings, lasting, tokenizer, (metrics.registry,), fleet.expected_wait_s, self._tracer)


def _counted_here(services: Sequence[Service]) -> Iterator[Metric]:
    """What an ingress has counted itself."""
    for service in services:
        if service.metrics_so_far is not None:
            yield from service.metrics_so_far.collect({})


def build_app(args: DeploymentConfig | Mapping[str, Any]) -> Application:
    """The application of `args`, a DeploymentConfig or its mapping. Raises ConfigError."""
    config = args if isinstance(args, DeploymentConfig) else DeploymentConfig.from_mapping(args)
    require_exporter(config.otlp_traces_endpoint)
    ingress = serve.deployment(
        name=INGRESS,
        num_replicas=config.num_ingresses,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=MAX_ONGOING,
        max_surge_percent=100,  # a new one is up before an old one goes
        # A connection cannot be handed over: an ingress that is to stop outlives the streams it carries.
        graceful_shutdown_timeout_s=config.ingress_drain_timeout_s,
        graceful_shutdown_wait_loop_s=0.5,
        max_constructor_retry_count=3,
        logging_config=LOGS,
    )(IngressHost)
    ingress = _versioned(ingress, ingress_version(config))
    return ingress.bind(config, [engine_pool(model, config.log_level) for model in config.models])


def engine_pool(model: ModelConfig, log_level: str) -> Application:
    """The deployment of one model's replicas. With several ranks, each gets a bundle of the replica's placement group,
    and the replica itself, which only drives them, sits in the first.
    """
    make_policy(model.routing.policy)  # one that cannot be made is refused here, before any process is started
    per_rank = {"CPU": model.num_cpus, "GPU": float(_num_gpus(model.engine))}
    if model.engine.num_ranks > 1:
        bundle = {name: amount for name, amount in per_rank.items() if amount}
        if not bundle:
            raise ConfigError(f"{model.name}: num_cpus must be above 0 where a replica has several ranks.")
        placement: dict[str, Any] = {
            "ray_actor_options": {"num_cpus": 0},
            "placement_group_bundles": [dict(bundle) for _ in range(model.engine.num_ranks)],
            "placement_group_strategy": model.placement_strategy,
        }
    else:
        placement = {"ray_actor_options": {"num_cpus": per_rank["CPU"], "num_gpus": per_rank["GPU"]}}
    replicas: dict[str, Any] = {"num_replicas": model.num_replicas}
    if model.autoscaling is not None:
        replicas = {"autoscaling_config": serve_config(model, model.autoscaling, log_level)}
    pool = serve.deployment(
        name=engine_name(model),
        **replicas,
        max_surge_percent=model.max_surge_percent,
        **placement,
        max_ongoing_requests=MAX_ONGOING,
        max_queued_requests=MAX_WAITING_FOR_REPLICA,
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),  # type: ignore[arg-type]
        graceful_shutdown_timeout_s=model.drain_timeout_s,
        graceful_shutdown_wait_loop_s=0.5,
        # A look finds a process that has ended; what is to be found in it, it finds itself. So looks are frequent, and
        # an answer that is late under load means nothing.
        health_check_period_s=1,
        health_check_timeout_s=60,
        max_constructor_retry_count=3,
        logging_config=LOGS,
    )(EngineHost)
    return _versioned(pool, engine_version(model, log_level)).bind(model, log_level)


def _versioned(deployment: serve.Deployment, version: str) -> serve.Deployment:
    """Serve restarts the replicas whose version has changed: see rollout.py. It would give out random ones."""
    return deployment.options(version=version, _internal=True)  # the only way there is in Ray 2.60


def engine_name(model: ModelConfig) -> str:
    """What the model's pool is called in Serve and in Ray's dashboard."""
    return "engine-" + (re.sub(r"[^a-z0-9._]+", "-", model.name.lower()).strip("-") or "model")


def _import_engine(config: EngineConfig) -> tuple[tuple[str, float], ...]:
    """Import what building the engine needs; a replica of several ranks leaves that to them. Returns the phase."""
    if config.num_ranks > 1:
        return ()
    started = time.perf_counter()
    if not config.is_fake:
        importlib.import_module("octavo.engine.runner.build")
    return (("import torch", time.perf_counter() - started),)


def node_address() -> str:
    """The address under which the cluster knows this node, and other nodes reach it."""
    here = ray.get_runtime_context().get_node_id()
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    (address,) = (node["NodeManagerAddress"] for node in nodes if node["NodeID"] == here)
    return str(address)


def _num_gpus(config: EngineConfig) -> int:
    """Ray shows an actor only the GPUs it asked for."""
    if config.device == "auto" and not config.is_fake:
        return int(ray.is_initialized() and ray.cluster_resources().get("GPU", 0) >= 1)  # type: ignore[no-untyped-call]
    return int(config.device == "cuda")

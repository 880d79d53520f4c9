"""`octavo serve`: brings a deployment up on Ray Serve, says what that took, and takes it down in order.

The order matters. What can be known to be wrong is found before Ray starts; the model is downloaded here, once, with
its progress shown, and the replicas get its path. On a signal the application is deleted, which makes Serve stop
accepting and wait for the requests in progress; only then does Ray go.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

from rich.console import Console
from rich.table import Table

from octavo.cluster.config import DeploymentConfig, ModelConfig
from octavo.cluster.machine import (
    check_port,
    check_reachable,
    free_ports,
    has_haproxy,
    kill_descendants,
    physical_cores,
)
from octavo.engine import env
from octavo.engine.errors import ConfigError
from octavo.engine.types import EngineInfo

POLL_S = 0.1
WATCH_S = 1.0
FIRST_TOKEN_S = 120.0
# Serve's own shutdown after all requests are done.
SHUTDOWN_S = 20.0
# An ingress outlives the engines' deadline by this, to tell its clients what became of their requests.
INGRESS_MARGIN_S = 10.0
LOOPBACK = "127.0.0.1"
OBJECT_STORE_BYTES = 256 << 20  # nothing of ours goes through it


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How to run, as opposed to what: not part of a deployment.

    address: Ray cluster to join; None = start Ray here, for this process's life.
    haproxy: HAProxy in front instead of Serve's Python proxy, if it is installed and Ray is started here: the first
        token is sooner and the tokens cost less.
    grpc_port: where gRPC is spoken too; None = nowhere. HAProxy listens there on `host`, Serve's Python proxy on all
        addresses.
    """

    host: str = LOOPBACK
    port: int = 8000
    address: str | None = None
    dashboard: bool = False
    haproxy: bool = True
    grpc_port: int | None = None

    @property
    def url(self) -> str:
        """Where a client on this machine reaches the server."""
        host = {"0.0.0.0": LOOPBACK, "::": "[::1]"}.get(self.host, self.host)
        return f"http://{host}:{self.port}"


class StartUp:
    """Seconds per phase of the start-up, in order."""

    def __init__(self, started: float) -> None:
        self.started = started  # perf_counter
        self.phases: list[tuple[str, float]] = [("command line", time.perf_counter() - started)]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.phases.append((name, time.perf_counter() - begun))

    def table(self, infos: Mapping[str, EngineInfo]) -> Table:
        table = Table(title=None, show_header=False, box=None, padding=(0, 1))
        table.add_column(style="dim")
        table.add_column(justify="right")
        for name, seconds in self.phases:
            table.add_row(name, f"{seconds:6.2f} s")
            if name == "replica":
                for model, info in infos.items():
                    of = f" ({model})" if len(infos) > 1 else ""
                    for inner, inner_seconds in info.phases:
                        table.add_row(f"  {inner}{of}", f"{inner_seconds:6.2f} s")
        table.add_row("[bold]total[/bold]", f"[bold]{time.perf_counter() - self.started:6.2f} s[/bold]")
        return table


class Signals:
    """The first SIGINT or SIGTERM sets `stop`; the second ends the process at once. Main thread only."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self.arm()

    def arm(self) -> None:
        """Again after whoever else sets handlers: Ray's driver does, for SIGTERM, and aborts there."""
        for number in self._before:
            signal.signal(number, self._handle)

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.stop.is_set():
            sys.stderr.write("octavo: stopped by force\n")
            kill_descendants()
            os._exit(128 + number)
        self.stop.set()


class Stopped(Exception):
    """A signal came while something was waited for."""


def run(config: DeploymentConfig, options: ServerOptions, started: float) -> int:
    """Serve until a signal comes. Returns the exit code. Raises ConfigError for what cannot work."""
    console = Console(stderr=True, highlight=False)
    start_up = StartUp(started)
    if options.grpc_port == options.port:
        raise ConfigError(f"HTTP and gRPC cannot share port {options.port}: choose another with --grpc-port.")
    if options.address is None:
        check_port(options.host, options.port)
        if options.grpc_port is not None:
            check_port(options.host, options.grpc_port, "--grpc-port")
    elif options.address != "auto":
        check_reachable(options.address)
    with start_up.phase("find model"):
        config = prepare(config)
    _prepare_environment(config, options)
    signals = Signals()
    try:
        with start_up.phase("import ray"):
            import ray  # noqa: F401
            from ray import serve  # noqa: F401
        with start_up.phase("start ray"):
            dashboard = _start_ray(config, options)
            signals.arm()
        try:
            with start_up.phase("start serve"):
                start_serve(options)
                signals.arm()
            _deploy(config, options, start_up, signals.stop)
            infos = {model.name: _engine_info(model) for model in config.models}
            with start_up.phase("first token"):
                for model in config.models:
                    _first_token(config, model, options, infos[model.name])
            _announce(console, config, options, start_up, infos, dashboard)
            code = _watch(signals.stop)
            console.print("octavo: stopping; requests in progress may finish")
        except Stopped:
            code = 0
        finally:
            _stop(config, options)
    finally:
        signals.restore()
    return code


def prepare(config: DeploymentConfig) -> DeploymentConfig:
    """Find everything that can be found before Ray starts: the model's files, its name, its tokenizer, a template.

    Returns `config` with local paths in place of names. Raises ConfigError.
    """
    return replace(config, models=tuple(_prepare_model(model) for model in config.models))


def _prepare_model(config: ModelConfig) -> ModelConfig:
    from octavo.engine.assets import has_tokenizer
    from octavo.engine.loader.progress import Terminal
    from octavo.engine.loader.source import resolve_model

    engine = config.engine
    if engine.is_fake:
        return config
    dummy, place = engine.load_format == "dummy", engine.download_dir
    model = resolve_model(engine.model, revision=engine.revision, download_dir=place, progress=Terminal(), shapes=dummy)
    if dummy and engine.tokenizer is None and model.kind == "folder" and not has_tokenizer(model.path):
        raise ConfigError(
            f"{model.name} has no tokenizer, and clients send text: name a model that has with --tokenizer."
        )
    names = config.served_model_name or (model.served_model_name,)
    tokenizer = None
    if engine.tokenizer is not None:
        found = resolve_model(engine.tokenizer, download_dir=engine.download_dir, progress=Terminal())
        tokenizer = str(found.path)
    engine = replace(engine, model=str(model.path), tokenizer=tokenizer, revision=None, download_dir=None)
    return replace(config, engine=engine, served_model_name=names)


def _prepare_environment(config: DeploymentConfig, options: ServerOptions) -> None:
    if options.address is None:
        threads = max(1, physical_cores() // _num_ranks(config))
        metrics_port, stats_port = free_ports(2)
        ports = (metrics_port, stats_port) if options.haproxy and has_haproxy() else None
        env.prepare_local_cluster(threads, ports)


def _start_ray(config: DeploymentConfig, options: ServerOptions) -> str | None:
    """Start or join. Returns the URL of Ray's dashboard, if there is one."""
    import ray

    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": True}
    if options.address is not None:
        try:
            return _dashboard(ray.init(address=options.address, **quiet))
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(f"There is no Ray cluster at {options.address!r}: {_last_line(error)}") from None
    context = ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, math.ceil(sum(_cpus(model) for model in config.models))),
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=options.dashboard,
        **quiet,
    )
    return _dashboard(context) if options.dashboard else None


def _dashboard(context: Any) -> str | None:
    return f"http://{context.dashboard_url}" if context.dashboard_url else None


def start_serve(options: ServerOptions) -> None:
    """On the Ray cluster this process has joined; where Serve runs, it stays as it is. Raises ConfigError."""
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.config import HTTPOptions, gRPCOptions
    from ray.serve.schema import LoggingConfig

    from octavo.cluster.ingress.grpc.register import SERVICER_FUNCTIONS

    _quiet_driver()
    grpc = None
    if options.grpc_port is not None:
        grpc = gRPCOptions(port=options.grpc_port, grpc_servicer_functions=list(SERVICER_FUNCTIONS))
    logs = LoggingConfig(enable_access_log=False, log_level="WARNING")
    try:
        http = HTTPOptions(host=options.host, port=options.port)
        serve.start(http_options=http, grpc_options=grpc, logging_config=logs)
    except (RayError, RuntimeError, TimeoutError) as error:
        logging.getLogger(__name__).debug("serve.start failed", exc_info=True)
        raise ConfigError(f"Ray Serve could not start: {_last_line(error)}") from None


def _deploy(config: DeploymentConfig, options: ServerOptions, start_up: StartUp, stop: threading.Event) -> None:
    """Deploy and wait until it runs. Raises ConfigError with the replica's own sentence if it cannot, or Stopped."""
    from ray import serve
    from ray.serve.schema import ApplicationStatus

    from octavo.cluster.app import APP, build_app

    with start_up.phase("replica"):
        target = serve.RunTarget(build_app(config), name=APP, route_prefix="/")
        serve.run_many([target], wait_for_applications_running=False)
        while True:
            app = serve.status().applications.get(APP)
            if app is not None and app.status == ApplicationStatus.RUNNING:
                return
            messages = [] if app is None else [app.message, *(d.message for d in app.deployments.values())]
            for message in messages:
                if sentence := re.search(r"ConfigError: (.+)", message):
                    raise ConfigError(sentence.group(1).strip())
            if app is not None and app.status == ApplicationStatus.DEPLOY_FAILED:
                raise ConfigError(f"The deployment failed: {app.message}")
            if stop.wait(POLL_S):
                raise Stopped


def _engine_info(model: ModelConfig) -> EngineInfo:
    from ray import serve

    from octavo.cluster import wire
    from octavo.cluster.app import APP, engine_name
    from octavo.protos.octavo.v1 import tokens_pb2

    data = serve.get_deployment_handle(engine_name(model), APP).info.remote().result(timeout_s=FIRST_TOKEN_S)
    return wire.info_from_proto(tokens_pb2.EngineInfo.FromString(data))


def _first_token(config: DeploymentConfig, model: ModelConfig, options: ServerOptions, info: EngineInfo) -> None:
    """Ask the server itself: what is announced has been seen to work."""
    path, fields = _example(info)
    if info.pooling.generates:
        path, fields = "/v1/completions", {"prompt": "Hello", "max_tokens": 1, "temperature": 0}
    request = urllib.request.Request(f"{options.url}{path}", json.dumps({"model": model.name, **fields}).encode())
    request.add_header("Content-Type", "application/json")
    if config.api_key:
        request.add_header("Authorization", f"Bearer {config.api_key[0]}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a company's HTTP proxy
    try:
        with opener.open(request, timeout=FIRST_TOKEN_S) as response:
            response.read()
    except urllib.error.HTTPError as error:
        raise ConfigError(f"The server is up, but its first answer was an error: {error.read().decode()}") from None
    except OSError as error:
        raise ConfigError(f"The server is up, but {options.url} cannot be reached: {error}") from None


def _example(info: EngineInfo) -> tuple[str, dict[str, Any]]:
    """The path, and a body without the model's name, of what the model is for."""
    if info.pooling.generates:
        return "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello!"}]}
    return "/classify" if info.pooling.classifies else "/v1/embeddings", {"input": "Hello!"}


def _announce(
    console: Console,
    config: DeploymentConfig,
    options: ServerOptions,
    start_up: StartUp,
    infos: Mapping[str, EngineInfo],
    dashboard: str | None,
) -> None:
    console.print(start_up.table(infos))
    for model in config.models:
        info = infos[model.name]
        blocks = f"{info.num_blocks:,} KV blocks of {info.block_size} tokens" if info.pooling.is_causal else "no KV"
        blocks += _memory(info)
        weights = "" if info.quantization == "none" else f", {info.quantization} weights"
        pool = f", {model.num_replicas} replicas" if model.num_replicas > 1 else ""
        ranks = f" of {model.engine.num_ranks} ranks" if model.engine.num_ranks > 1 else ""
        what = f"{info.dtype}{weights} on {info.device}, context {info.max_model_len:,}, {blocks}{pool}{ranks}"
        console.print(f"[bold]{model.name}[/bold]: {what}")
    console.print(f"[bold green]Serving at {options.url}/v1[/bold green]  (Ctrl-C stops)")
    if options.grpc_port is not None:
        console.print(f"gRPC at {options.url.removeprefix('http://').rpartition(':')[0]}:{options.grpc_port}")
    if dashboard is not None:
        console.print(f"Ray dashboard at {dashboard} (`ray get-auth-token` prints its token)")
    key = "-H 'Authorization: Bearer KEY' " if config.api_key else ""
    name = config.models[0].name
    path, fields = _example(infos[name])
    body = json.dumps({"model": name, **fields})
    console.print(
        f"  curl {options.url}{path} {key}-H 'Content-Type: application/json' -d '{body}'",
        markup=False,
        soft_wrap=True,
    )


def _memory(info: EngineInfo) -> str:
    """Where a GPU's memory went, if that was measured."""
    if not info.weights_bytes:
        return ""
    kv, weights, steps = (f"{count / 2**30:.1f} GiB" for count in (info.kv_bytes, info.weights_bytes, info.steps_bytes))
    return f" ({kv} of KV, {weights} of weights, {steps} for steps)"


def _watch(stop: threading.Event) -> int:
    """Wait for the signal. Returns early, with code 1, if Ray is gone."""
    import ray

    while not stop.wait(WATCH_S):
        if not ray.is_initialized():
            sys.stderr.write("octavo: Ray has stopped\n")
            return 1
    return 0


def _stop(config: DeploymentConfig, options: ServerOptions) -> None:
    """Drain the application, then end what was started here."""
    import ray
    from ray import serve

    from octavo.cluster.app import APP

    try:
        serve.delete(APP, _blocking=False)
        drain_s = max(model.drain_timeout_s for model in config.models)
        deadline = time.monotonic() + drain_s + INGRESS_MARGIN_S + SHUTDOWN_S
        while APP in serve.status().applications and time.monotonic() < deadline:
            time.sleep(POLL_S)
    except Exception as error:
        logging.getLogger(__name__).debug("Serve did not shut down in order: %s", error)
    ray.shutdown()


def _num_ranks(config: DeploymentConfig) -> int:
    return sum(model.max_replicas * model.engine.num_ranks for model in config.models)


def _cpus(model: ModelConfig) -> float:
    return model.max_replicas * model.engine.num_ranks * model.num_cpus


def _quiet_driver() -> None:
    """Serve's driver-side log says what the start-up table says better."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)


def _last_line(error: BaseException) -> str:
    """Where an error that came from another process, traceback and all, says what it is."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__

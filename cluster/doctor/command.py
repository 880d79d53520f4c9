"""`octavo doctor`: is this cluster fit to run a model? No Ray until the command runs."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from octavo.cluster.attach import attached, quiet_ray
from octavo.cluster.config import DeploymentConfig, ModelConfig
from octavo.cluster.doctor.here import Wanted
from octavo.cluster.rollout_checks import is_path
from octavo.engine.errors import ConfigError


def doctor(
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster: auto, host:port, or ray://host:10001 from outside. Without it, this machine."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Deployment YAML: are its models on all nodes, its GPUs and CPUs there?")
    ] = None,
    port: Annotated[int, typer.Option(help="HTTP port to find free.", min=1, max=65535)] = 8000,
    grpc_port: Annotated[int, typer.Option(help="gRPC port to find free.", min=1, max=65535)] = 9000,
    timeout: Annotated[float, typer.Option(help="Seconds a node may take to answer.", min=1.0)] = 20.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything found, for machines.")] = False,
) -> None:
    """Check a cluster before a model does: nodes, network, clocks, versions, GPUs, limits.

    Looks at every node from inside and starts nothing that stays.
    Exit code 0: nothing failed; 1: something did; 2: there is no cluster.
    """
    started = time.perf_counter()
    waiting = Console(stderr=True)
    try:
        models = None if config is None else DeploymentConfig.from_file(config).models
        with waiting.status("connecting to Ray") as status, _ray(address):
            from octavo.cluster.doctor.survey import survey

            found = survey(_wanted(port, grpc_port, models or ()), models, timeout, status.update)
    except ConfigError as error:
        sys.stderr.write(f"octavo: {error}\n")
        raise typer.Exit(2) from None
    from octavo.cluster.doctor import report
    from octavo.cluster.doctor.judge import judge

    checks = judge(found)
    if as_json:
        sys.stdout.write(report.as_json(found, checks) + "\n")
    else:
        report.show(Console(highlight=False), found, checks, time.perf_counter() - started)
    raise typer.Exit(0 if report.passed(checks) else 1)


@contextmanager
def _ray(address: str | None) -> Iterator[None]:
    """The cluster at `address`, or one of this machine alone for as long as it takes."""
    if address is not None:
        with attached(address):
            yield
        return
    import ray

    quiet_ray()
    ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


def _wanted(port: int, grpc_port: int, models: tuple[ModelConfig, ...]) -> Wanted:
    given = (path for model in models for path in (model.engine.model, model.engine.tokenizer) if path is not None)
    paths = dict.fromkeys(str(Path(name).expanduser().absolute()) for name in given if is_path(name))
    return Wanted((("HTTP", port), ("gRPC", grpc_port)), tuple(paths))

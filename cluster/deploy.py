"""`octavo deploy` and `octavo undeploy`: put a configuration on a running cluster, replica by replica; take it away.

What runs goes on until what replaces it has generated a token. A deployment that fails is rolled back.
"""

from __future__ import annotations

import pickle
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from octavo.cluster.attach import attached, quiet_ray
from octavo.cluster.config import DeploymentConfig
from octavo.cluster.rollout import Change, compare, ingress_version
from octavo.cluster.rollout_checks import check, read_deployment
from octavo.cluster.serve import ServerOptions, start_serve
from octavo.engine.errors import ConfigError

if TYPE_CHECKING:
    from octavo.cluster.overview import Deployment, Overview, Replica

POLL_S = 0.5
NOTE = b"deployment"  # its key in Ray's control store
KINDS = {"new": "green", "restart": "yellow", "in place": "cyan", "removed": "red", "unchanged": "dim"}
WHAT = {
    "new": "starts",
    "restart": "restarts, replica by replica",
    "in place": "changes in place",
    "removed": "stops; requests for it end",
    "unchanged": "stays as it is",
}

Address = Annotated[str, typer.Option(help="Ray cluster: auto, host:port, or ray://host:10001 from outside.")]


class Failed(Exception):
    """The new configuration cannot run, or does not in time. The message is a sentence."""


def deploy(
    file: Annotated[Path, typer.Argument(help="Deployment YAML, or a Serve config that contains one.")],
    address: Address = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would change, and change nothing.")] = False,
    host: Annotated[str, typer.Option(help="Address to listen on, where Serve does not run yet.")] = "0.0.0.0",
    port: Annotated[int, typer.Option(help="Port to listen on, where Serve does not run yet.")] = 8000,
    grpc_port: Annotated[int | None, typer.Option(help="The same for gRPC; without it there is none.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds after which a deployment has failed.", min=1)] = 3600.0,
) -> None:
    """Deploy a configuration to a running cluster, replacing what runs there without a break.

    New replicas generate a token before old ones stop; old ones finish their
    requests or hand them over. What fails is put back as it was.
    Exit code 0: it runs; 1: it failed; 2: refused, nothing was touched.
    """
    console = Console(highlight=False)
    try:
        config = read_deployment(file)
        with attached(address):
            before = running_config()
            for warning in check(config):
                console.print(Text(warning, style="yellow"))
            from octavo.cluster.app import engine_name

            changes = compare(before, config, engine_name)
            console.print(plan(changes))
            code = (
                0
                if dry_run
                else _roll_out(
                    console, config, before, changes, ServerOptions(host, port, grpc_port=grpc_port), timeout
                )
            )
    except ConfigError as error:
        sys.stderr.write(f"octavo: {error}\n")
        code = 2
    except KeyboardInterrupt:
        sys.stderr.write("octavo: the rollout goes on without being watched (`octavo status --watch`)\n")
        code = 130
    raise typer.Exit(code)


def undeploy(
    address: Address = "auto",
    timeout: Annotated[float, typer.Option(help="Seconds after which to stop waiting.", min=1)] = 3600.0,
) -> None:
    """Take the deployment away: requests in progress may finish, new ones are refused."""
    console = Console(highlight=False)
    try:
        with attached(address):
            code = _take_away(console, timeout)
    except ConfigError as error:
        sys.stderr.write(f"octavo: {error}\n")
        code = 2
    except KeyboardInterrupt:
        sys.stderr.write("octavo: it goes on without being watched\n")
        code = 130
    raise typer.Exit(code)


def running_config() -> DeploymentConfig | None:
    """What the application here was built from; None = there is none, or one of another version of octavo."""
    from ray.serve.context import _get_global_client

    from octavo.cluster.app import APP, INGRESS

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return None
    try:
        info, _ = client.get_deployment_info(INGRESS, APP)
        built_from = info.replica_config.init_args[0]
        repr(built_from)  # one pickled before a setting existed lacks its slot
    except Exception:
        return None
    if not isinstance(built_from, DeploymentConfig):
        return None
    # Serve keeps what an ingress was started with; what has changed in place since is in our own note, if that is of
    # this ingress and not of one before it.
    noted = _noted()
    return noted if noted is not None and ingress_version(noted) == ingress_version(built_from) else built_from


def _note(config: DeploymentConfig) -> None:
    from ray.experimental import internal_kv as kv

    from octavo.cluster.failures import NAMESPACE

    kv._internal_kv_put(NOTE, pickle.dumps(config), namespace=NAMESPACE)


def _noted() -> DeploymentConfig | None:
    from ray.experimental import internal_kv as kv

    from octavo.cluster.failures import NAMESPACE

    try:
        value = kv._internal_kv_get(NOTE, namespace=NAMESPACE)
        config = pickle.loads(value) if value is not None else None
        repr(config)
    except Exception:  # of another version
        return None
    return config if isinstance(config, DeploymentConfig) else None


def plan(changes: Sequence[Change]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(style="bold", overflow="fold")
    table.add_column(overflow="fold")
    for change in changes:
        text = Text(WHAT[change.kind], style=KINDS[change.kind])
        if change.kind == "restart" and not change.why:
            text.append("\nits models' settings, or octavo's version, have changed", style="default")
        for name, was, now in change.why:
            text.append(f"\n{name}: {was} → {now}", style="default")
        table.add_row(change.deployment, text)
    return table


def _roll_out(
    console: Console,
    config: DeploymentConfig,
    before: DeploymentConfig | None,
    changes: Sequence[Change],
    options: ServerOptions,
    timeout: float,
) -> int:
    started = time.monotonic()
    _start_serve(options)
    were = _apply(config)
    restarted = {change.deployment for change in changes if change.kind == "restart"}
    try:
        old = {r.id for r in _running(were) if r.deployment in restarted}
        _watch(console, config, were, old, timeout)
    except Failed as failure:
        console.print(Text(f"Failed: {failure}", style="bold red"))
        if before is None:
            console.print("Nothing ran before; `octavo undeploy` clears away what is left.")
            return 1
        console.print("The configuration that ran before is put back.")
        are = _apply(before)
        try:
            _watch(console, before, are, {r.id for r in _running(are)} - {r.id for r in _running(were)}, timeout)
        except Failed as again:
            console.print(Text(f"That failed too: {again}", style="bold red"))
        else:
            console.print("It runs.")
        return 1
    console.print(Text(f"It runs, after {time.monotonic() - started:.0f} s.", style="green"))
    return 0


def _start_serve(options: ServerOptions) -> None:
    """Where it runs, it stays as it is."""
    from ray.serve.context import _get_global_client

    quiet_ray()  # importing Serve has undone it
    if _get_global_client(raise_if_no_controller_running=False) is None:
        start_serve(options)


def _apply(config: DeploymentConfig) -> Overview:
    """Tell Serve what there is to be; returns what there was."""
    from ray import serve

    from octavo.cluster.app import APP, build_app
    from octavo.cluster.overview import look

    before = look(APP)
    target = serve.RunTarget(build_app(config), name=APP, route_prefix="/")
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    _note(config)
    return before


def _watch(console: Console, config: DeploymentConfig, before: Overview, old: set[str], timeout: float) -> None:
    """Until everything runs that shall. Raises Failed with the first sentence of a replica that cannot.

    before: from before the change; what it says of failures is old. old: ids of the replicas that have to go.
    """
    from octavo.cluster.app import APP
    from octavo.cluster.overview import look

    stale, wanted = set(messages(before)), wanted_replicas(config)
    deadline = time.monotonic() + timeout
    said = ""
    with console.status("rolling out") as spinner:
        while True:
            overview = look(APP)
            line = progress(overview, old)
            if line not in ("", said) and not console.is_terminal:
                console.print(line, soft_wrap=True)
            said = line
            spinner.update(line or "rolling out")
            if is_up(overview, wanted, old):
                return
            for message in messages(overview):
                if message not in stale and (sentence := re.search(r"ConfigError: (.+)", message)):
                    raise Failed(sentence.group(1).strip())
            if overview.app_status == "DEPLOY_FAILED":
                reasons = [message.strip() for message in messages(overview) if message.strip()]
                raise Failed(" ".join(reasons) or "Serve does not say why.")
            if time.monotonic() > deadline:
                raise Failed(f"it does not run after {timeout:g} s ({line}).")
            time.sleep(POLL_S)


def messages(overview: Overview) -> list[str]:
    return [overview.app_message, *(deployment.message for deployment in overview.deployments)]


def wanted_replicas(config: DeploymentConfig) -> dict[str, int | None]:
    """Deployment → how many replicas it is to have; None = as many as its autoscaler wants."""
    from octavo.cluster.app import INGRESS, engine_name

    pools = {engine_name(model): None if model.autoscaling else model.num_replicas for model in config.models}
    return {INGRESS: config.num_ingresses, **pools}


def is_up(overview: Overview, wanted: Mapping[str, int | None], old: set[str]) -> bool:
    """Whether all that shall run does (`wanted_replicas`), and nothing of before but what drains.

    Serve's own word is no guide: it waits for what drains, calls an application that has to grow running, and for a
    moment still tells the numbers of before.
    """
    if overview.app_status not in ("DEPLOYING", "RUNNING"):
        return False
    known = {deployment.name: deployment for deployment in overview.deployments}
    return known.keys() == wanted.keys() and all(
        wanted[name] in (None, deployment.wanted) and _is_up(deployment, overview, old)
        for name, deployment in known.items()
    )


def _is_up(deployment: Deployment, overview: Overview, old: set[str]) -> bool:
    replicas = [replica for replica in overview.replicas if replica.deployment == deployment.name]
    running = _running(overview, deployment.name)
    settled = all(replica.state in ("RUNNING", "STOPPING") for replica in replicas)
    return settled and len(running) == deployment.wanted and not any(replica.id in old for replica in running)


def progress(overview: Overview, old: set[str]) -> str:
    """One line: per deployment that is not done, its replicas, new and old. old: ids of those that have to go."""
    parts = []
    for deployment in overview.deployments:
        replicas = [replica for replica in overview.replicas if replica.deployment == deployment.name]
        if deployment.status == "HEALTHY" and all(replica.state == "RUNNING" for replica in replicas):
            continue
        running = _running(overview, deployment.name)
        kept = sum(replica.id in old for replica in running)
        stopping = [replica for replica in replicas if replica.state == "STOPPING"]
        live = sum(r.status.stats.num_running + r.status.stats.num_waiting for r in stopping if r.status is not None)
        words = [f"{len(running) - kept} of {deployment.wanted} up"]
        words += [f"{count} {word}" for count, word in ((kept, "old"), (_starting(replicas), "starting")) if count]
        if stopping:
            words.append(f"{len(stopping)} draining" + (f" {live} requests" if live else ""))
        parts.append(f"{deployment.name}: {', '.join(words)}")
    return "; ".join(parts)


def _running(overview: Overview, deployment: str | None = None) -> list[Replica]:
    return [r for r in overview.replicas if r.state == "RUNNING" and deployment in (None, r.deployment)]


def _starting(replicas: Sequence[Replica]) -> int:
    return sum(replica.state in ("STARTING", "UPDATING", "RECOVERING") for replica in replicas)


def _take_away(console: Console, timeout: float) -> int:
    from ray import serve
    from ray.serve.context import _get_global_client

    from octavo.cluster.app import APP
    from octavo.cluster.overview import look

    quiet_ray()  # importing Serve has undone it
    if _get_global_client(raise_if_no_controller_running=False) is None:
        raise ConfigError("Serve is not running on this cluster.")
    if look(APP).app_status == "NOT_DEPLOYED":
        raise ConfigError("Nothing is deployed on this cluster.")
    serve.delete(APP, _blocking=False)
    deadline = time.monotonic() + timeout
    with console.status("draining") as spinner:
        while (overview := look(APP)).app_status != "NOT_DEPLOYED":
            spinner.update(progress(overview, set()) or "draining")
            if time.monotonic() > deadline:
                console.print(Text(f"It is still there after {timeout:g} s.", style="red"))
                return 1
            time.sleep(POLL_S)
    console.print("Taken away.")
    return 0

"""Overview: what runs of octavo on the cluster this process has joined, as plain values, asked for within seconds.

Asks Serve's controller what there should be, and every replica, past the controller, how it is. So a controller that
is gone takes away the plan, not the facts. Knows Serve's actors; does not know how an overview is shown.
"""

from __future__ import annotations

import pickle
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.serve._private.common import RequestMetadata

from octavo.cluster import failures, wire
from octavo.engine.types import EngineStats

SERVE = "serve"  # the namespace of its actors
CONTROLLER = "SERVE_CONTROLLER_ACTOR"
REPLICA = "SERVE_REPLICA::"
CONTROLLER_S = 4.0
REPLICA_S = 2.5
SHOWN_FAILURES = 5
ENGINE = "engine-"  # how the names of the deployments begin that hold engines


@dataclass(frozen=True, slots=True)
class Replica:
    """One replica. node: for people. status: its own word; None = it has none to give, or gave none in time,
    as `trouble` then says.

    tokens_per_s: between the last two samples; None with one. ttft_s: mean from being queued to the first token, of the
    requests that got one between the samples, or of all if none did; None if there were none at all.
    """

    id: str
    deployment: str
    state: str
    node: str = ""
    pid: int | None = None
    started_at: float | None = None  # Unix seconds
    status: wire.ReplicaStatus | None = None
    trouble: str | None = None
    tokens_per_s: float | None = None
    ttft_s: float | None = None


@dataclass(frozen=True, slots=True)
class Deployment:
    name: str
    status: str
    message: str
    wanted: int  # replicas


@dataclass(frozen=True, slots=True)
class Overview:
    """app_status: Serve's word for the application, NOT_DEPLOYED without one, "" while the controller does not answer.

    controller: why Serve's controller does not answer; None = it does. proxies: (node, status). nodes: Ray's id → name.
    """

    at: float  # Unix seconds
    app_status: str = ""
    app_message: str = ""
    deployed_at: float | None = None
    deployments: tuple[Deployment, ...] = ()
    replicas: tuple[Replica, ...] = ()
    proxies: tuple[tuple[str, str], ...] = ()
    controller: str | None = None
    failures: tuple[failures.Failure, ...] = ()
    nodes: tuple[tuple[str, str], ...] = ()

    @property
    def is_well(self) -> bool:
        return self.controller is None and self.app_status == "RUNNING" and not any(r.trouble for r in self.replicas)

    @property
    def stats(self) -> EngineStats:
        """Sums over all replicas."""
        names = EngineStats.__dataclass_fields__
        known = [replica.status.stats for replica in self.replicas if replica.status is not None]
        return EngineStats(**{name: sum(getattr(stats, name) for stats in known) for name in names})


def look(app: str, before: Overview | None = None) -> Overview:
    """An overview of the application `app`; rates are of the time since `before`. Raises what Ray raises when it is
    gone altogether.
    """
    nodes = _node_names()
    details, trouble = _details()
    if details is None:
        overview = Overview(time.time(), controller=trouble, replicas=_by_names(app))
    else:
        overview = from_details(details, app, nodes)
    asked = _ask(overview.replicas)
    return replace(
        overview,
        replicas=tuple(_with_rates(replica, before) for replica in asked),
        failures=_failures(),
        nodes=tuple(nodes.items()),
    )


def from_details(details: Mapping[str, Any], app: str, nodes: Mapping[str, str]) -> Overview:
    """From the controller's own description of everything, as its `get_serve_instance_details` returns it."""
    proxies = tuple(
        (nodes.get(node_id, node_id[:6]), _word(proxy["status"]))
        for node_id, proxy in (details.get("proxies") or {}).items()
    )
    found = details.get("applications", {}).get(app)
    if found is None:
        return Overview(time.time(), "NOT_DEPLOYED", proxies=proxies)
    deployments, replicas = [], []
    for name, deployment in found["deployments"].items():
        given = (name, _word(deployment["status"]), deployment.get("message") or "")
        deployments.append(Deployment(*given, deployment["target_num_replicas"]))
        for replica in deployment["replicas"]:
            node = nodes.get(replica.get("node_id") or "", replica.get("node_ip") or "")
            state, pid, started = _word(replica["state"]), replica.get("pid"), replica.get("start_time_s")
            replicas.append(Replica(replica["replica_id"], name, state, node, pid, started))
    return Overview(
        time.time(),
        _word(found["status"]),
        found.get("message") or "",
        found.get("last_deployed_time_s"),
        tuple(deployments),
        tuple(sorted(replicas, key=lambda r: (r.deployment, r.started_at or 0.0, r.id))),
        proxies,
    )


def rate(now: wire.ReplicaStatus, before: wire.ReplicaStatus) -> float | None:
    """Generated tokens per second between two samples of one replica; None where there is no time between them."""
    seconds = now.clock - before.clock
    return (now.stats.generation_tokens - before.stats.generation_tokens) / seconds if seconds > 0 else None


def ttft(now: EngineStats, before: EngineStats | None) -> float | None:
    """Mean seconds from being queued at the replica to the first token; see Replica.ttft_s."""
    if before is not None and (count := now.first_tokens - before.first_tokens) > 0:
        return (now.first_token_s - before.first_token_s) / count
    return now.first_token_s / now.first_tokens if now.first_tokens else None


def _details() -> tuple[Mapping[str, Any] | None, str | None]:
    """(the controller's description, None) or (None, why there is none)."""
    try:
        controller = ray.get_actor(CONTROLLER, namespace=SERVE)
    except ValueError:
        return None, "Serve is not running"
    try:
        details: Any = ray.get(controller.get_serve_instance_details.remote(), timeout=CONTROLLER_S)
        return details, None
    except GetTimeoutError:
        return None, f"Serve's controller does not answer within {CONTROLLER_S:g} s"
    except RayError as error:
        return None, f"Serve's controller is gone ({type(error).__name__})"


def _by_names(app: str) -> tuple[Replica, ...]:
    """The replicas that are there, as the names of Ray's actors tell: SERVE_REPLICA::app#deployment#id."""
    replicas = []
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == SERVE and actor["name"].startswith(f"{REPLICA}{app}#"):
            _, deployment, replica_id = actor["name"].removeprefix(REPLICA).split("#")
            replicas.append(Replica(replica_id, deployment, "THERE"))
    return tuple(sorted(replicas, key=lambda r: (r.deployment, r.id)))


def _ask(replicas: Sequence[Replica]) -> list[Replica]:
    """Every running engine replica for its status, all at once."""
    calls: dict[Any, Replica] = {}
    for replica in replicas:
        if replica.deployment.startswith(ENGINE) and replica.state in ("RUNNING", "THERE", "STOPPING"):
            call = _call(replica, "status")
            if call is not None:
                calls[call] = replica
    ready, _ = ray.wait(list(calls), num_returns=len(calls), timeout=REPLICA_S) if calls else ([], [])
    answers: dict[str, wire.ReplicaStatus] = {}
    troubles = {r.id: f"no answer within {REPLICA_S:g} s" for r in calls.values() if r.state != "STOPPING"}
    for call in ready:
        try:
            answers[calls[call].id] = wire.decode_status(ray.get(call))
            troubles.pop(calls[call].id, None)
        except RayError as error:
            troubles[calls[call].id] = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return [replace(r, status=answers.get(r.id), trouble=troubles.get(r.id)) for r in replicas]


def _call(replica: Replica, method: str) -> Any:
    """Call the replica's actor as Serve's router does. A handle would need the controller to find it."""
    name = f"{REPLICA}octavo#{replica.deployment}#{replica.id}"
    try:
        actor = ray.get_actor(name, namespace=SERVE)
    except ValueError:
        return None
    request_id = uuid.uuid4().hex
    metadata = RequestMetadata(request_id=request_id, internal_request_id=request_id, call_method=method)
    return actor.handle_request.remote(pickle.dumps(metadata))


def _with_rates(replica: Replica, before: Overview | None) -> Replica:
    if replica.status is None:
        return replica
    earlier = before.replicas if before is not None else ()
    then = next((other.status for other in earlier if other.id == replica.id), None)
    speed = rate(replica.status, then) if then is not None else None
    first = ttft(replica.status.stats, then.stats if then is not None else None)
    return replace(replica, tokens_per_s=speed, ttft_s=first)


def _failures() -> tuple[failures.Failure, ...]:
    try:
        return tuple(failures.recent(SHOWN_FAILURES))
    except Exception:  # whatever Ray raises where its store cannot be reached: not worth losing the rest for
        return ()


def _node_names() -> dict[str, str]:
    """Ray's id → address, with the beginning of the id where several nodes share one."""
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    entries = [(node["NodeID"], node["NodeManagerAddress"]) for node in nodes if node["Alive"]]
    addresses = [address for _, address in entries]
    return {
        node_id: address if addresses.count(address) == 1 else f"{address} {node_id[:6]}"
        for node_id, address in entries
    }


def _word(value: Any) -> str:
    """Serve's states are strings in one version's dicts and enumerations in another's."""
    return str(getattr(value, "value", value))

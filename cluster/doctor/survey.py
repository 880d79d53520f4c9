"""Looks at every node of the Ray cluster this process has joined: one probe each, side by side, nothing without end.

Gathers only; what the answers mean is judge.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import ray
from ray._private.state import available_resources_per_node
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from octavo.cluster.capacity import NodeResources, shortage
from octavo.cluster.config import ModelConfig
from octavo.cluster.doctor.collective import NUM_BYTES, Seats
from octavo.cluster.doctor.facts import Collective, Link, Node, Survey
from octavo.cluster.doctor.here import Wanted
from octavo.cluster.doctor.links import AT_ONCE, Peer
from octavo.cluster.doctor.probe import DoctorProbe

HEAD = "node:__internal_head__"
CONTROLLER = "SERVE_CONTROLLER_ACTOR"
LEFT_IN_ORDER = (1, 4)  # Ray's numbers for an expected end and for a node scaled down because it was idle
LINK_S = 3.0  # for one connection
ON_TIME_S = 2.0  # that an answer may take to come back beyond the work it is about


@dataclass(frozen=True, slots=True)
class _Probe:
    node: Node
    actor: Any
    echo: int = 0


def survey(
    wanted: Wanted, models: Sequence[ModelConfig] | None, timeout_s: float, say: Callable[[str], None]
) -> Survey:
    """`timeout_s`: how long a node may take to answer at all, and all ranks to meet. `say`: what is waited for."""
    nodes = [_node(entry) for entry in ray.nodes() if _matters(entry)]  # type: ignore[no-untyped-call]
    present = [node for node in nodes if node.lost is None]
    started = [_Probe(node, _start(node.id)) for node in present]
    try:
        say(f"asking {len(present)} node{'s' if len(present) != 1 else ''}")
        probes = _look(started, wanted, timeout_s)
        answering = [probe for probe in probes if probe.node.facts is not None]
        say("connecting each node to each other")
        links = _connect(answering)
        say("summing over all nodes")
        collectives = [_all_reduce(answering, links, "gloo", timeout_s)]
        with_gpu = [probe for probe in answering if probe.node.gpus >= 1]
        if with_gpu:
            say("summing over a GPU of each node")
            collectives.append(_over_gpus(with_gpu, links, timeout_s))
    finally:
        for probe in started:
            ray.kill(probe.actor)
    looked_at = {probe.node.id: probe.node for probe in probes}
    lacking = None
    if models is not None:
        lacking = shortage(models, [NodeResources(node.gpus, node.cpus) for node in present])
    return Survey(
        tuple(looked_at.get(node.id, node) for node in nodes),
        links,
        tuple(collectives),
        serving=_is_serving(),
        has_config=models is not None,
        shortage=lacking,
    )


def _matters(entry: Mapping[str, Any]) -> bool:
    """Nodes that left as they were told to are nobody's trouble."""
    return bool(entry["Alive"]) or entry.get("DeathReason") not in LEFT_IN_ORDER


def _node(entry: Mapping[str, Any]) -> Node:
    resources = entry["Resources"]
    lost = None if entry["Alive"] else (entry.get("DeathReasonMessage") or "it ended unexpectedly")
    return Node(
        id=entry["NodeID"],
        name=entry["NodeManagerHostname"],
        address=entry["NodeManagerAddress"],
        is_head=HEAD in resources,
        gpus=resources.get("GPU", 0.0),
        cpus=resources.get("CPU", 0.0),
        lost=lost,
    )


def _start(node_id: str, num_gpus: int = 0) -> Any:
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return DoctorProbe.options(scheduling_strategy=there, num_gpus=num_gpus).remote()  # type: ignore[attr-defined]


def _look(probes: Sequence[_Probe], wanted: Wanted, timeout_s: float) -> list[_Probe]:
    """The probes with what their nodes say, or why they do not."""
    answers = _gather([probe.actor.look.remote(wanted) for probe in probes], timeout_s)
    looked = []
    for probe, (answer, error) in zip(probes, answers, strict=True):
        if answer is None:
            looked.append(replace(probe, node=replace(probe.node, trouble=error)))
        else:
            facts, echo = answer
            looked.append(replace(probe, node=replace(probe.node, facts=facts), echo=echo))
    return looked


def _connect(probes: Sequence[_Probe]) -> tuple[Link, ...]:
    """From each to each other, both ways."""
    peers = [Peer(probe.node.id, probe.node.address, probe.echo) for probe in probes]
    calls, timeout_s = [], ON_TIME_S
    for probe in probes:
        others = [peer for peer in peers if peer.node_id != probe.node.id]
        calls.append(probe.actor.reach.remote(probe.node.id, others, LINK_S))
        timeout_s = max(timeout_s, ON_TIME_S + LINK_S * (1 + len(others) // AT_ONCE))
    links: list[Link] = []
    for probe, (answer, error) in zip(probes, _gather(calls, timeout_s), strict=True):
        if answer is not None:
            links.extend(answer)
        else:
            links.extend(Link(probe.node.id, p.node_id, error=error) for p in peers if p.node_id != probe.node.id)
    return tuple(links)


def _over_gpus(probes: Sequence[_Probe], links: Sequence[Link], timeout_s: float) -> Collective:
    """One GPU of each node, or two of a node that is alone. GPUs that models hold cannot be had."""
    each = 1 if len(probes) > 1 else 2
    free = available_resources_per_node()  # type: ignore[no-untyped-call]
    lacking = [probe.node for probe in probes if free.get(probe.node.id, {}).get("GPU", 0.0) < each]
    if lacking and all(node.gpus < each for node in lacking):
        return Collective("nccl", skipped="there is only one GPU")
    if lacking:
        return Collective("nccl", skipped=f"the GPUs of {len(lacking)} of {len(probes)} nodes are in use")
    actors = [replace(probe, actor=_start(probe.node.id, num_gpus=1)) for probe in probes for _ in range(each)]
    try:
        return _all_reduce(actors, links, "nccl", timeout_s)
    finally:
        for probe in actors:
            ray.kill(probe.actor)


def _all_reduce(
    probes: Sequence[_Probe], links: Sequence[Link], backend: Literal["gloo", "nccl"], timeout_s: float
) -> Collective:
    """A rank per probe; two for gloo on a node that is alone, so that something is connected."""
    ids = {probe.node.id for probe in probes}
    if not probes:
        return Collective(backend, skipped="no node answered")
    if any(link.error for link in links if link.source in ids and link.target in ids):
        return Collective(backend, skipped="not every node reaches every other one")
    ranks = [(i,) for i in range(len(probes))] if len(probes) > 1 else [(0, 1)]
    size = sum(map(len, ranks))
    host = probes[0]
    ((port, error),) = _gather([host.actor.host.remote(host.node.address, timeout_s)], timeout_s)
    if port is None:
        return Collective(backend, size, errors=((host.node.id, error or ""),))
    seats = [Seats(mine, size, host.node.address, port, timeout_s, backend) for mine in ranks]
    calls = [probe.actor.all_reduce.remote(mine) for probe, mine in zip(probes, seats, strict=True)]
    slowest, errors = 0.0, []
    for probe, (answer, error) in zip(probes, _gather(calls, 2 * timeout_s + ON_TIME_S), strict=True):
        seconds, error = answer if answer is not None else (0.0, error)
        slowest = max(slowest, seconds)
        if error is not None:
            errors.append((probe.node.id, error))
    return Collective(backend, size, NUM_BYTES, slowest, tuple(errors))


def _gather(calls: Sequence[Any], timeout_s: float) -> list[tuple[Any, str | None]]:
    """(result, None) or (None, why there is none) of each call, all within `timeout_s`."""
    if not calls:
        return []
    ready, _ = ray.wait(list(calls), num_returns=len(calls), timeout=timeout_s)
    there = set(ready)
    results: list[tuple[Any, str | None]] = []
    for call in calls:
        if call not in there:
            results.append((None, f"it did not answer within {timeout_s:g} s"))
            continue
        try:
            results.append((ray.get(call), None))
        except RayError as error:
            results.append((None, _reason(error)))
    return results


def _reason(error: RayError) -> str:
    """Ray's errors carry whole tracebacks; the last line says what it was."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _is_serving() -> bool:
    return any(actor["name"] == CONTROLLER for actor in ray.util.list_named_actors(all_namespaces=True))

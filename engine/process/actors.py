"""Ranks as Ray actors: where they are put, what they are called, how they are ended.

The one place in the engine that knows Ray. Inside a placement group (a Serve replica has one) the ranks take its
bundles; elsewhere Ray finds the room. Starting, ending and asking why one died go through Ray; nothing of a step does.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import select
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, get_current_placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from octavo.engine.build import Engine, Phases, RankOptions, assemble
from octavo.engine.config import EngineConfig
from octavo.engine.errors import ConfigError
from octavo.engine.parallel.layout import Layout
from octavo.engine.process.placement import order_bundles
from octavo.engine.process.rank import RankSpec, run_rank
from octavo.engine.process.ranks import Deadlines, Ranks

LOOPBACK = "127.0.0.1"
GRACE_S = 0.2  # for Ray to end a process, before the system does
ENDED_S = 3.0  # until a killed process is gone

_numbers = itertools.count()


def build_ranks(config: EngineConfig, phases: Phases, options: RankOptions) -> Engine:
    """An engine of several ranks. Raises ConfigError, RankLost."""
    layout = Layout(config.tensor_parallel_size, config.pipeline_parallel_size)
    launcher = RayLauncher(config, layout, options)
    deadlines = Deadlines(call_s=options.start_timeout_s, hang_s=options.hang_timeout_s, step_s=options.step_timeout_s)
    ranks = Ranks(config, layout, launcher, deadlines, phases, options.threads or launcher.threads)
    try:
        return assemble(config, ranks.info, ranks)
    except BaseException:
        ranks.close()
        raise


class RankActor:
    """One rank. `run` goes on until the replica ends."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name

    def run(self, spec: RankSpec) -> None:
        gpus = ray.get_gpu_ids()
        run_rank(spec, _own_node(), int(gpus[0]) if gpus else None)


_RemoteRank: Any = ray.remote(max_restarts=0, max_task_retries=0)(RankActor)


@dataclass(frozen=True, slots=True)
class _Node:
    id: str
    address: str
    resources: dict[str, float] = field(default_factory=dict)


class RayLauncher:
    """A Launcher (see ranks.py). Starts a Ray of its own, for this process, where none is initialised."""

    def __init__(self, config: EngineConfig, layout: Layout, options: RankOptions) -> None:
        self._layout, self._label = layout, options.label or f"offline-{os.getpid()}-{next(_numbers)}"
        self.threads: int | None = None
        self._own_ray = not ray.is_initialized()
        if self._own_ray:
            self.threads = max(1, _cores() // layout.size)
            _start_ray(layout.size)
        self._nodes = {node.id: node for node in _nodes()}
        self._here = _own_node()
        self._group = get_current_placement_group()
        self._actors: list[Any] = []
        self._runs: list[ray.ObjectRef[None]] = []
        if self._group is None:
            num_gpus = _gpus_per_rank(config, self._nodes.values())
            _check_room(layout.size, options.num_cpus, num_gpus, self._nodes.values())
            self._places: list[dict[str, Any]] = [{"num_cpus": options.num_cpus, "num_gpus": num_gpus}] * layout.size
            local = len(self._nodes) == 1
        else:
            bundles, nodes = _bundles(self._group, layout)
            order = order_bundles(nodes, layout, self._here)
            self._places = [_place(self._group, index, bundles[index]) for index in order]
            local = {nodes[index] for index in order} == {self._here}
        self.host = LOOPBACK if local else self._nodes[self._here].address

    def start(self, specs: Sequence[RankSpec]) -> None:
        for spec, place in zip(specs, self._places, strict=True):
            name = f"octavo {spec.name} {self._label}"
            self._actors.append(_RemoteRank.options(name=name, **place).remote(name))
        for spec, actor in zip(specs, self._actors, strict=True):
            self._runs.append(actor.run.options(name=f"octavo {spec.name}").remote(spec))

    def cause(self, rank: int, timeout_s: float) -> str | None:
        try:
            ray.get(self._runs[rank], timeout=timeout_s)
        except GetTimeoutError:
            return None
        except (RayError, RayTaskError) as error:
            return _why(error)
        return None

    def where(self, node: str) -> str:
        found = self._nodes.get(node)
        return f"node {found.address}" if found is not None else f"node {node}"

    def end(self, called: Sequence[tuple[str, int]]) -> None:
        here = [pid for node, pid in called if node == self._here]
        with _Watched(here) as processes:
            for actor in self._actors:
                with contextlib.suppress(Exception):  # whatever Ray has to say: what is left is killed below
                    ray.kill(actor, no_restart=True)
            processes.wait(GRACE_S)
            processes.kill()
            processes.wait(ENDED_S)
        self._actors.clear()

    def close(self) -> None:
        if self._own_ray and ray.is_initialized():
            self._own_ray = False
            ray.shutdown()


class _Watched:
    """Processes of this node, by handles that cannot come to mean another process."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._handles: list[int] = []
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                self._handles.append(os.pidfd_open(pid))

    def __enter__(self) -> _Watched:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            os.close(handle)

    def kill(self) -> None:
        for handle in self._handles:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)

    def wait(self, timeout_s: float) -> None:
        """Until all are gone, or the time is over."""
        deadline = time.monotonic() + timeout_s
        left = set(self._handles)
        while left and (remaining := deadline - time.monotonic()) > 0:
            poll = select.poll()
            for handle in left:
                poll.register(handle, select.POLLIN)
            left -= {handle for handle, _ in poll.poll(remaining * 1000)}


def _start_ray(num_ranks: int) -> None:
    """A Ray for these ranks alone. Never one that happens to run on this machine: to join it is the caller's choice,
    by ray.init before."""
    ray.init(address="local", num_cpus=max(_cores(), num_ranks), include_dashboard=False, logging_level=logging.ERROR)


def _check_room(num_ranks: int, num_cpus: float, num_gpus: int, nodes: Any) -> None:
    for name, each in (("GPU", num_gpus), ("CPU", num_cpus)):
        there = sum(node.resources.get(name, 0.0) for node in nodes)
        if each * num_ranks > there:
            raise ConfigError(
                f"{num_ranks} ranks (tensor_parallel_size × pipeline_parallel_size) need {each * num_ranks:g} {name}s, "
                f"the cluster has {there:g}."
            )


def _gpus_per_rank(config: EngineConfig, nodes: Any) -> int:
    if config.device == "cpu" or config.is_fake:
        return 0
    return int(config.device == "cuda" or any(node.resources.get("GPU", 0) >= 1 for node in nodes))


def _bundles(group: PlacementGroup, layout: Layout) -> tuple[list[dict[str, float]], list[str]]:
    """(resources, node) of each bundle of the group, whose driver runs in one of them: so it is placed."""
    bundles = list(group.bundle_specs)
    if len(bundles) < layout.size:
        raise ConfigError(
            f"{layout.size} ranks need as many bundles of the placement group they run in, which has {len(bundles)}."
        )
    nodes = placement_group_table(group)["bundles_to_node_id"]
    return bundles, [nodes[index] for index in range(len(bundles))]


def _place(group: PlacementGroup, index: int, resources: dict[str, float]) -> dict[str, Any]:
    others = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU", "memory")}
    return {
        "num_cpus": resources.get("CPU", 0),
        "num_gpus": resources.get("GPU", 0),
        "resources": {name: amount for name, amount in others.items() if not name.startswith("accelerator_type:")},
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, index),
    }


def _nodes() -> list[_Node]:
    return [
        _Node(node["NodeID"], node["NodeManagerAddress"], node["Resources"])
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
    ]


def _own_node() -> str:
    return str(ray.get_runtime_context().get_node_id())


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _why(error: Exception) -> str:
    """Ray's pages on a dead actor, in a few words."""
    text = str(error)
    if isinstance(error, RayTaskError):
        return text.strip().rpartition("\n")[2]
    if isinstance(error, OutOfMemoryError) or "memory monitor" in text.lower():
        return "Ray ended its process because its node ran out of memory"
    if re.search(r"node (has|was|is) (died|dead|terminated|marked dead)|its node has died", text, re.IGNORECASE):
        return "its node died"
    detail = re.search(r"Worker exit detail: ([^.\n]+)", text)
    if detail is None:
        detail = re.search(r"died because of an error[^:]*: ?(.+)|cause: (.+)", text)
    if detail is None or "connection error" in detail.group(0):
        return "its process ended (killed, or out of memory)"
    return f"its process ended: {(detail.group(1) or detail.group(2)).strip()}"

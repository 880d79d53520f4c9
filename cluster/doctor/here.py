"""Facts about the machine this process runs on, for `octavo doctor`. No Ray here; torch only to see the native ops.

Nothing here raises: what cannot be found out is missing from the facts, and judged as missing.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import ipaddress
import os
import platform
import resource
import shutil
import socket
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from octavo.cluster.doctor.facts import Disk, Gpu, Interface, ModelFiles, NodeFacts, Port
from octavo.engine import env

DISTRIBUTIONS = ("octavo", "ray", "torch", "transformers")
NVIDIA_SMI_S = 10.0
MIB = 1 << 20
SIOCGIFADDR = 0x8915


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to look at beyond the machine itself. ports: (use, number). models: paths that every node must have."""

    ports: tuple[tuple[str, int], ...] = ()
    models: tuple[str, ...] = ()


def gather(wanted: Wanted) -> NodeFacts:
    return NodeFacts(
        hostname=socket.gethostname(),
        machine=_machine(),
        interfaces=_interfaces(),
        versions=versions(),
        gpus=_gpus(),
        kernels=_kernels(),
        nofile=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        shm=_shm(),
        disks=_disks(),
        ports=tuple(Port(use, number, _is_free(number)) for use, number in wanted.ports),
        models=tuple(model_files(path) for path in wanted.models),
    )


def versions() -> tuple[tuple[str, str | None], ...]:
    found: list[tuple[str, str | None]] = [("python", platform.python_version())]
    for name in DISTRIBUTIONS:
        try:
            found.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            found.append((name, None))
    return tuple(found)


def model_files(path: str) -> ModelFiles:
    """Opens every file and reads a byte of it: a mount that lists but cannot be read is found."""
    root = Path(path)
    try:
        root.stat()  # says more than "no files" where there is nothing
        files = sorted(item for item in root.rglob("*") if item.is_file()) if root.is_dir() else [root]
        digest, size = hashlib.sha256(), 0
        for item in files:
            with item.open("rb") as opened:
                opened.read(1)
                length = os.fstat(opened.fileno()).st_size
            size += length
            digest.update(f"{item.relative_to(root)} {length}\n".encode())
    except OSError as error:
        return ModelFiles(path, error=(error.strerror or str(error)).lower())
    return ModelFiles(path, len(files), size, digest.hexdigest()[:16])


def _machine() -> str:
    """Equal in all processes that share a kernel and its network."""
    parts = []
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/net"))
    return " ".join(parts) or socket.gethostname()


def _interfaces() -> tuple[Interface, ...]:
    return (*_interfaces_v4(), *_interfaces_v6())


def _interfaces_v4() -> list[Interface]:
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # one without an IPv4 address
                answer = fcntl.ioctl(asked.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found.append(Interface(name, socket.inet_ntoa(answer[20:24])))
    return found


def _interfaces_v6() -> list[Interface]:
    try:
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
    except OSError:
        return []
    fields = [line.split() for line in lines]
    return [Interface(f[5], str(ipaddress.IPv6Address(bytes.fromhex(f[0])))) for f in fields if len(f) == 6]


def _gpus() -> tuple[Gpu, ...]:
    """Asks nvidia-smi: it sees all GPUs, where Ray shows a process only its own."""
    query = "--query-gpu=index,name,driver_version,memory.total,memory.free"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return parse_gpus(said)


def parse_gpus(said: str) -> tuple[Gpu, ...]:
    """From lines `0, NVIDIA H100, 570.1, 81559, 81000`, memory in MiB; a line of another form is skipped."""
    found = []
    for line in said.splitlines():
        with contextlib.suppress(ValueError):
            index, name, driver, memory, free = (part.strip() for part in line.split(","))
            found.append(Gpu(int(index), name, driver, int(memory) * MIB, int(free) * MIB))
    return tuple(found)


def _kernels() -> tuple[str, ...]:
    try:
        from octavo.kernels.cpu.library import runnable

        return tuple(runnable())
    except (ImportError, OSError):
        return ()


def _shm() -> int | None:
    try:
        return shutil.disk_usage("/dev/shm").total
    except OSError:
        return None


def _disks() -> tuple[Disk, ...]:
    found = []
    for use, path in (("Ray's files", Path(tempfile.gettempdir())), ("downloaded models", env.cache_dir())):
        there = next((folder for folder in (path, *path.parents) if folder.exists()), None)
        if there is not None:
            usage = shutil.disk_usage(there)
            found.append(Disk(use, str(path), usage.total, usage.free))
    return tuple(found)


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # Lets two nodes of one machine look at the same time; a listener is still found.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True

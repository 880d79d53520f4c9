"""An `octavo serve` process for the length of a benchmark, and the certainty that nothing of it stays behind.

Every process started below it inherits a mark in its environment; together with parent ids seen while it ran, that
finds processes which have left the family (Ray's daemons do). Linux only: reads /proc.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import httpx

MARK = "OCTAVO_BENCHMARK_RUN"
Identity = tuple[int, int]  # pid, start time in clock ticks: a pid by itself may be reused


class ServerError(Exception):
    """The server did not start, or did not end as it should."""


class Server:
    """`octavo serve MODEL` on a free port of 127.0.0.1. `began` is the moment (time.perf_counter) it was started."""

    def __init__(self, model: str, options: Sequence[str], log: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self._mark = uuid.uuid4().hex
        self._seen: set[Identity] = set()
        log.parent.mkdir(parents=True, exist_ok=True)
        program = Path(sys.executable).parent / "octavo"
        command = [str(program), "serve", model, "--host", "127.0.0.1", "--port", str(self.port), *options]
        with log.open("wb") as output:
            self.began = time.perf_counter()
            self._process = subprocess.Popen(
                command,
                env={**os.environ, MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_ready(self, timeout_s: float) -> None:
        """Until /health answers 200. Raises ServerError if it ends before, or takes too long."""
        deadline = self.began + timeout_s
        with httpx.Client(timeout=5) as client:
            while time.perf_counter() < deadline:
                self.look_around()
                if self._process.poll() is not None:
                    raise ServerError(f"the server ended with exit code {self._process.returncode}:\n{self.tail()}")
                with contextlib.suppress(httpx.HTTPError):
                    if client.get(f"{self.url}/health").status_code == 200:
                        return
                time.sleep(0.05)
        raise ServerError(f"the server was not ready after {timeout_s:.0f} s:\n{self.tail()}")

    def look_around(self) -> None:
        """Remember which processes belong to the server now."""
        self._seen |= family(self._process.pid) | marked(self._mark)

    def stop(self, timeout_s: float = 60, grace_s: float = 5) -> tuple[int | None, list[str]]:
        """SIGTERM, then (exit code, processes still there `grace_s` after the exit, which are killed now).

        The exit code is None if the server did not end in time and was killed.
        """
        self.look_around()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            code: int | None = self._process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            code = None
            self.look_around()
            self._process.kill()
            self._process.wait()
        deadline = time.perf_counter() + grace_s
        while (left := self._left()) and time.perf_counter() < deadline:
            time.sleep(0.1)
        orphans = [f"{pid} {command_line(pid)}" for pid, _ in sorted(left)]
        for pid, _ in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return code, orphans

    def tail(self, lines: int = 40) -> str:
        """The end of what the server has printed."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def _left(self) -> set[Identity]:
        alive = {identity for identity in self._seen if start_time(identity[0]) == identity[1]}
        return (alive | marked(self._mark)) - {(self._process.pid, start_time(self._process.pid) or 0)}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def family(pid: int) -> set[Identity]:
    """All descendants of a process that are alive now, zombies left out."""
    children: dict[int, list[Identity]] = {}
    for stat in _stats():
        children.setdefault(stat[1], []).append((stat[0], stat[2]))
    found: set[Identity] = set()
    ahead = [pid]
    while ahead:
        for identity in children.get(ahead.pop(), ()):
            if identity not in found:
                found.add(identity)
                ahead.append(identity[0])
    return found


def marked(mark: str) -> set[Identity]:
    """All processes that carry the mark in the environment they were started with."""
    wanted = f"{MARK}={mark}".encode()
    found = set()
    for pid, _, started in _stats():
        with contextlib.suppress(OSError):
            if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.add((pid, started))
    return found


def start_time(pid: int) -> int | None:
    """Clock ticks since boot; None if there is no such process, or only its zombie."""
    stat = _stat(pid)
    return None if stat is None else stat[2]


def command_line(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:120]
    return ""


def _stats() -> list[tuple[int, int, int]]:
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [stat for stat in map(_stat, pids) if stat is not None]


def _stat(pid: int) -> tuple[int, int, int] | None:
    """(pid, parent, start time); None if it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else (pid, int(fields[1]), int(fields[19]))

"""Hosts on one machine: network namespaces joined by a bridge, each with an address and a raylet of its own.

`cut` takes a host off the network as a pulled cable would: its processes go on, nothing reaches them, no connection is
closed. Needs root and the right to make namespaces (Linux).
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

RAY = str(Path(sys.executable).with_name("ray"))
COMMON = ("--disable-usage-stats", "--object-store-memory=100000000")
# A node counts as dead after three looks in vain, one a second.
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}


def allowed() -> bool:
    """Whether this machine lets us make hosts."""
    if os.geteuid() or not shutil.which("ip"):
        return False
    return subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode == 0


class Hosts:
    """`count` hosts, the first of which is the head. Ends all their processes at exit."""

    def __init__(self, count: int, cpus: float = 1) -> None:
        self._tag = f"oct{os.getpid() % 10000}"
        self._net = f"10.{200 + os.getpid() % 50}.{os.getpid() // 50 % 250}"
        self.count, self._cpus = count, cpus
        self.addresses = [f"{self._net}.{i + 2}" for i in range(count)]

    def __enter__(self):
        self._ip("link", "add", self._tag, "type", "bridge")
        self._ip("link", "set", self._tag, "up")
        for i in range(self.count):
            name, outer, inner = self._name(i), f"{self._tag}o{i}", f"{self._tag}i{i}"
            self._ip("netns", "add", name)
            self._ip("link", "add", outer, "type", "veth", "peer", "name", inner)
            self._ip("link", "set", inner, "netns", name)
            self._ip("link", "set", outer, "master", self._tag)
            self._ip("link", "set", outer, "up")
            self._ip("-n", name, "addr", "add", f"{self.addresses[i]}/24", "dev", inner)
            self._ip("-n", name, "link", "set", inner, "up")
            self._ip("-n", name, "link", "set", "lo", "up")
            # Leads nowhere; by it programs find out which address is theirs.
            self._ip("-n", name, "route", "add", "default", "dev", inner)
        return self

    def __exit__(self, *exc):
        for i in range(self.count):
            found = subprocess.run(["ip", "netns", "pids", self._name(i)], capture_output=True, text=True, check=False)
            for pid in found.stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "link", "del", f"{self._tag}o{i}"], capture_output=True, check=False)
            subprocess.run(["ip", "netns", "del", self._name(i)], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", self._tag], capture_output=True, check=False)

    def start_head(self) -> None:
        """A Ray cluster whose head has no CPUs to give: what it runs needs none."""
        head = [RAY, "start", "--head", f"--node-ip-address={self.addresses[0]}", "--port=6379"]
        self.run(0, [*head, "--include-dashboard=false", "--num-cpus=0", *COMMON], ENVIRONMENT)

    def start_workers(self) -> None:
        """The other hosts' raylets, one after the other: they share this machine's files, where each picks names."""
        for i in range(1, self.count):
            self.run(i, [*self._joining(i), f"--num-cpus={self._cpus:g}", *COMMON], ENVIRONMENT)

    def _joining(self, host) -> list[str]:
        return [RAY, "start", f"--address={self.addresses[0]}:6379", f"--node-ip-address={self.addresses[host]}"]

    def run(self, host, command, env=None, timeout=90):
        done = subprocess.run(
            ["ip", "netns", "exec", self._name(host), *command],
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def popen(self, host, command, env=None, **options):
        return subprocess.Popen(
            ["ip", "netns", "exec", self._name(host), *command], env={**os.environ, **(env or {})}, **options
        )

    def cut(self, host) -> None:
        self._ip("link", "set", f"{self._tag}o{host}", "down")

    def mend(self, host) -> None:
        self._ip("link", "set", f"{self._tag}o{host}", "up")

    def pids(self, host) -> list[int]:
        return [int(pid) for pid in self._ip("netns", "pids", self._name(host)).split()]

    def _name(self, host) -> str:
        return f"{self._tag}h{host}"

    @staticmethod
    def _ip(*words: str) -> str:
        done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
        return done.stdout

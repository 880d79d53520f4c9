"""The parent's side of a worker: a process with an engine in it, that computes when told and is frozen otherwise.

Knows processes and JSON lines (see workers/jobs.py for the messages). Does not know engines.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class WorkerError(Exception):
    """The worker said that it failed, died, or did not answer in time."""


class Worker:
    """One engine in a process group of its own. Frozen (SIGSTOP) between jobs, so that idle engines cost nothing."""

    def __init__(self, name: str, command: Sequence[str | Path], environment: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [str(part) for part in command],
                env={**os.environ, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
            )
        self._selector = selectors.DefaultSelector()
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._selector.register(self._process.stdout, selectors.EVENT_READ)
        self._unread = b""
        self._closed = False

    def ask(self, job: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Send a job, wait for its answer, freeze. Raises WorkerError."""
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()
            answer: dict[str, Any] = json.loads(self._line(time.monotonic() + timeout_s))
        except BrokenPipeError as error:
            raise WorkerError(self._died()) from error
        finally:
            self._signal(signal.SIGSTOP)
        if "error" in answer:
            raise WorkerError(f"{self.name}: {answer['error']} (its log: {self.log})")
        return answer

    def close(self) -> None:
        """Let it quit; after 20 seconds, kill it with all it started. A second time does nothing."""
        if self._closed:
            return
        self._closed = True
        self._signal(signal.SIGCONT)
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            assert self._process.stdin is not None
            self._process.stdin.write(b'{"op": "quit"}\n')
            self._process.stdin.close()
            self._process.wait(timeout=20)
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._selector.close()

    def _line(self, deadline: float) -> bytes:
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0:
                raise WorkerError(f"{self.name} did not answer in time (its log: {self.log}).")
            if self._selector.select(left):
                assert self._process.stdout is not None
                piece = self._process.stdout.read(1 << 20)
                if piece == b"":
                    raise WorkerError(self._died())
                self._unread += piece or b""
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _died(self) -> str:
        return f"{self.name} died with exit code {self._process.wait(timeout=10)} (its log: {self.log})."

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

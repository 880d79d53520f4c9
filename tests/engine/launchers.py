"""Ranks without Ray: as threads of this process, or as processes of their own that the test may kill."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence

from octavo.engine.process.rank import RankSpec, run_rank


class Threads:
    """A Launcher whose ranks are threads. They end when the driver hangs up."""

    host = "127.0.0.1"

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []

    def start(self, specs: Sequence[RankSpec]) -> None:
        for spec in specs:
            run = threading.Thread(target=run_rank, args=(spec, "here", None, lambda code: None, False), daemon=True)
            run.start()
            self.threads.append(run)

    def cause(self, rank, timeout_s):
        return None

    def where(self, node):
        return f"node {node}"

    def end(self, called) -> None:
        for thread in self.threads:
            thread.join(timeout=10)
            assert not thread.is_alive()

    def close(self) -> None:
        pass


class Processes:
    """A Launcher whose ranks are processes. `kept`: ranks that `start` does not start."""

    host = "127.0.0.1"

    def __init__(self, kept: Sequence[int] = (), watched: bool = True) -> None:
        self.processes: dict[int, multiprocessing.Process] = {}
        self._kept, self._watched = kept, watched

    def start(self, specs: Sequence[RankSpec]) -> None:
        context = multiprocessing.get_context("spawn")
        for spec in specs:
            if spec.rank not in self._kept:
                process = context.Process(
                    target=run_rank, args=(spec, "here", None, os._exit, self._watched), daemon=True
                )
                process.start()
                self.processes[spec.rank] = process

    def cause(self, rank, timeout_s):
        process = self.processes.get(rank)
        if process is None:
            return None
        process.join(timeout_s)
        code = process.exitcode
        return None if code is None else f"its process ended with {signal.Signals(-code).name if code < 0 else code}"

    def where(self, node):
        return f"node {node}"

    def end(self, called) -> None:
        for process in self.processes.values():
            process.join(0.2)
            process.kill()
            process.join(5)

    def close(self) -> None:
        pass

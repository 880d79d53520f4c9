"""Watchdog: a tiny child process that ends its parent when the parent gives no sign of life.

A stopped process answers nobody, Ray included; only a signal from outside ends it. The parent writes a byte through a
pipe now and then; the byte says for how many seconds it may be silent from then on. If the pipe closes, the parent is
gone and the child goes too. Run as a script, this file is the child, and imports next to nothing.
"""

import os
import select
import signal
import sys
import time

SLICE_S = 0.25
BEAT_S = 0.5
LONGEST_S = 255
STARTING_S = 120.0  # that a process may be silent while it starts: imports and checkpoints can hold its interpreter up


def watch(pipe: int, parent: int) -> None:
    """The child. Time is counted in slices during which the child itself ran: when both were frozen (a container
    paused, a laptop asleep), the silence of that time is nobody's fault."""
    allowed: float = LONGEST_S
    silent = 0.0
    while True:
        before = time.monotonic()
        ready, _, _ = select.select([pipe], [], [], SLICE_S)
        if ready:
            written = os.read(pipe, 4096)
            if not written:
                return
            allowed, silent = written[-1], 0.0
            continue
        silent += min(time.monotonic() - before, 2 * SLICE_S)
        if silent > allowed:
            if os.getppid() == parent:
                os.kill(parent, signal.SIGKILL)
            return


class Watchdog:
    """Starts the child for this process. `allowance_s`: how long the process may be silent, rounded up to a second.

    Somebody calls `beat` at least every BEAT_S seconds, from a thread that work cannot hold up; `start` makes one.
    """

    def __init__(self, allowance_s: float) -> None:
        import subprocess
        import threading

        reading, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        self.allow(allowance_s)
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        # -S -I: no site-packages, no settings from outside, a few megabytes. A session of its own: no Ctrl-C for it.
        command = [sys.executable, "-S", "-I", __file__, str(os.getpid())]
        self._child = subprocess.Popen(command, stdin=reading, start_new_session=True)
        os.close(reading)
        self.beat()

    def allow(self, seconds: float) -> None:
        """From the next beat on."""
        self._byte = bytes([min(LONGEST_S, max(1, -int(-seconds // 1)))])

    def beat(self) -> None:
        """Still alive. Never waits."""
        try:
            os.write(self._pipe, self._byte)
        except BlockingIOError:  # nobody reads: the child is stopped, and so of no use
            return
        except OSError:  # the child is gone, or `close` was called
            return

    def start(self) -> None:
        """Beat from a thread of its own."""
        import threading

        self._thread = threading.Thread(target=self._run, name="octavo-watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """The process is watched no longer."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1
            self._child.wait()

    def _run(self) -> None:
        while not self._stopping.wait(BEAT_S):
            self.beat()


if __name__ == "__main__":
    watch(0, int(sys.argv[1]))

"""How long work tells how far it is: a bar on a terminal, lines elsewhere, or nothing."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichBar

_SECONDS_PER_LINE = 10.0


class Progress(Protocol):
    """Called by one thread at a time, in the order start, advance …, done; then perhaps start again."""

    def start(self, total_bytes: int | None, description: str) -> None:
        """total_bytes None: not known."""
        ...

    def advance(self, num_bytes: int) -> None:
        """So many bytes more."""
        ...

    def done(self) -> None:
        """Over, whether or not it succeeded."""
        ...


class Silent:
    """Tells nothing."""

    def start(self, total_bytes: int | None, description: str) -> None: ...
    def advance(self, num_bytes: int) -> None: ...
    def done(self) -> None: ...


class Terminal:
    """A rich bar if `stream` is a terminal, else a line at the start, every ten seconds, and at the end."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._shown: Progress = Silent()

    def start(self, total_bytes: int | None, description: str) -> None:
        self._shown = _Bar(self._stream) if self._stream.isatty() else _Lines(self._stream)
        self._shown.start(total_bytes, description)

    def advance(self, num_bytes: int) -> None:
        self._shown.advance(num_bytes)

    def done(self) -> None:
        self._shown.done()
        self._shown = Silent()


class _Bar:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bar: RichBar | None = None

    def start(self, total_bytes: int | None, description: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(file=self._stream))
        self._task = self._bar.add_task(description, total=total_bytes)
        self._bar.start()

    def advance(self, num_bytes: int) -> None:
        if self._bar is not None:
            self._bar.advance(self._task, num_bytes)

    def done(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class _Lines:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._done, self._total, self._description = 0, None, ""

    def start(self, total_bytes: int | None, description: str) -> None:
        self._done, self._total, self._description = 0, total_bytes, description  # type: ignore[assignment]
        self._started = self._told = time.monotonic()
        print(f"{description} …" + (f" ({_mb(total_bytes)})" if total_bytes else ""), file=self._stream, flush=True)

    def advance(self, num_bytes: int) -> None:
        self._done += num_bytes
        if time.monotonic() - self._told >= _SECONDS_PER_LINE:
            self._told = time.monotonic()
            of = f" of {_mb(self._total)}" if self._total else ""
            print(f"{self._description}: {_mb(self._done)}{of}", file=self._stream, flush=True)

    def done(self) -> None:
        seconds = time.monotonic() - self._started
        print(f"{self._description}: {_mb(self._done)} in {seconds:.1f} s", file=self._stream, flush=True)


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"

"""How a run gets on, for who waits for it: a bar on a terminal, a line now and then elsewhere; and what came of it."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType

from rich import progress as bars
from rich.console import Console

from octavo.cluster.batch.run import Tally

SHOW_S = 0.1
LINE_S = 10.0  # between lines where nothing can be drawn over


class Progress:
    """`total`: lines of the input."""

    def __init__(self, console: Console, tally: Tally, total: int) -> None:
        self._console = console
        self._tally = tally
        self._total = total
        self._shown_at = 0.0
        self._bar: bars.Progress | None = None
        if console.is_terminal:
            self._bar = bars.Progress(
                bars.TextColumn("{task.description}"),
                bars.BarColumn(),
                bars.MofNCompleteColumn(),
                bars.TimeRemainingColumn(),
                bars.TextColumn("{task.fields[rate]}"),
                console=console,
            )
            self._task = self._bar.add_task("Answering", total=total, rate="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._draw(self._bar)
            self._bar.stop()

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False)

    def show(self) -> None:
        """The tally has changed."""
        now = time.monotonic()
        if now - self._shown_at < (SHOW_S if self._bar is not None else LINE_S):
            return
        first, self._shown_at = not self._shown_at, now
        if self._bar is not None:
            self._draw(self._bar)
        elif not first:
            self.say(
                f"{self._tally.done:,} of {self._total:,} lines, {self._tally.errors:,} errors, {rate(self._tally)}"
            )

    def _draw(self, bar: bars.Progress) -> None:
        bar.update(self._task, completed=self._tally.done, rate=rate(self._tally))


def rate(tally: Tally) -> str:
    return f"{tally.completion_tokens / tally.seconds:,.0f} tokens/s"


def summary(tally: Tally, target: Path, errors: Path | None) -> str:
    """What came of a run, in two lines."""
    places = f"{target}" if errors is None else f"{target}, {errors}"
    return (
        f"{tally.answered:,} answered, {tally.errors:,} errors, {tally.skipped:,} were there already → {places}\n"
        f"{tally.seconds:.1f} s: {tally.answered / tally.seconds:,.1f} requests/s, {rate(tally)} generated "
        f"({tally.completion_tokens:,}), {tally.prompt_tokens / tally.seconds:,.0f} prompt tokens/s "
        f"({tally.prompt_tokens:,})"
    )

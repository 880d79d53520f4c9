"""A run over a batch: what is missing is asked for, and answers are written as they come.

Knows lines, an answerer and journals. Memory is bounded by the requests on their way, however long the input is.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from octavo.cluster.batch.answerers import Answerer, Unanswered, Unreachable
from octavo.cluster.batch.items import BadLine, Item, Reply, answer, complaint, read_items
from octavo.cluster.batch.journal import Journal

SYNC_S = 1.0  # what the machine may lose when its power fails


@dataclass(slots=True)
class Tally:
    """What came of a run so far. `left`: requests that got no final answer, and may get one the next time."""

    answered: int = 0
    errors: int = 0
    skipped: int = 0
    left: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_problems: list[str] = field(default_factory=list)
    started_at: float = field(default_factory=time.monotonic)

    @property
    def done(self) -> int:
        return self.answered + self.errors + self.skipped

    @property
    def seconds(self) -> float:
        return max(1e-9, time.monotonic() - self.started_at)

    def count(self, reply: Reply) -> None:
        usage = reply.body.get("usage") if isinstance(reply.body, dict) else None
        if isinstance(usage, dict):
            self.prompt_tokens += _number(usage, "prompt_tokens", "input_tokens")
            self.completion_tokens += _number(usage, "completion_tokens", "output_tokens")

    def note(self, line: int, problem: str) -> None:
        if len(self.first_problems) < 10:
            self.first_problems.append(f"line {line}: {problem}")


class Run:
    """`outputs`: where answers go; `problems`: where lines go that are no requests, and answers that are errors."""

    def __init__(self, outputs: Journal, problems: Journal, tally: Tally, show: Callable[[], None]) -> None:
        self._outputs = outputs
        self._problems = problems
        self._tally = tally
        self._show = show

    async def all(self, source: Path, answerer: Answerer | None, concurrency: int) -> None:
        """Do what is missing; without an answerer, no request may be missing. Cancelled, it leaves undone what is
        unfinished. Raises Unreachable, OSError."""
        self._tally.started_at = time.monotonic()
        places = asyncio.Semaphore(concurrency)
        syncing = asyncio.create_task(self._sync())
        try:
            async with asyncio.TaskGroup() as group:
                for number, item in enumerate(read_items(source)):
                    if number % 1000 == 0:
                        await asyncio.sleep(0)  # lines that are skipped wait for nothing, and others want their turn
                    if self._is_done(item):
                        self._tally.skipped += 1
                    elif isinstance(item, BadLine):
                        self._write_bad(item)
                    else:
                        assert answerer is not None, item.custom_id
                        await places.acquire()
                        group.create_task(self._one(item, answerer, places))
                    self._show()
        except* (Unreachable, OSError) as failed:
            raise failed.exceptions[0] from None
        finally:
            syncing.cancel()
            with suppress(asyncio.CancelledError):
                await syncing

    def _is_done(self, item: Item | BadLine) -> bool:
        return item.key in self._outputs.done or item.key in self._problems.done

    async def _one(self, item: Item, answerer: Answerer, places: asyncio.Semaphore) -> None:
        try:
            reply = await answerer.answer(item)
        except Unanswered as unanswered:
            self._tally.left += 1
            self._tally.note(item.line, str(unanswered))
        else:
            self._tally.count(reply)
            if reply.ok:
                self._outputs.append(answer(item, reply))
                self._tally.answered += 1
            else:
                self._problems.append(answer(item, reply))
                self._tally.errors += 1
                self._tally.note(item.line, _message(reply))
        finally:
            places.release()
            self._show()

    def _write_bad(self, bad: BadLine) -> None:
        self._problems.append(complaint(bad))
        self._tally.errors += 1
        self._tally.note(bad.line, bad.message)

    async def _sync(self) -> None:
        while True:
            await asyncio.sleep(SYNC_S)
            for journal in (self._outputs, self._problems):
                await asyncio.to_thread(journal.sync)


def _number(usage: dict[str, Any], *names: str) -> int:
    """The first of the names that there is: vendors call the same differently."""
    return next((usage[name] for name in names if isinstance(usage.get(name), int)), 0)


def _message(reply: Reply) -> str:
    error: Any = reply.body.get("error") if isinstance(reply.body, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return f"{reply.status}: {message}" if message else f"status {reply.status}"

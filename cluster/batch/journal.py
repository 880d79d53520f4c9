"""Journal: a file of JSON lines that is the state of a run. A line is there, whole, or it has not been written.

Lines are appended with one write each, so a process that is killed leaves at most one that is cut short, at the end; it
is taken away before anything else is written. Once `sync` has returned, what was appended outlives the machine too.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from octavo.cluster.batch.items import key_of_record
from octavo.engine.errors import ConfigError


class Journal:
    """`done`: keys of the lines that were there when it was opened.

    Raises ConfigError if the file holds something else, which is not ours to change, or if another run has it open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: set[bytes] = set()
        self._unsynced = False
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ConfigError(f"Another run is writing to {path}: wait for it, or use another file.") from None
            self._end = self._read()
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            os.fsync(self._file)
        finally:
            os.close(self._file)

    def append(self, record: Mapping[str, Any]) -> None:
        """Raises OSError; the file is then as it was before."""
        data = json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        try:
            written = 0
            while written < len(data):
                written += os.write(self._file, data[written:])
        except OSError:
            os.ftruncate(self._file, self._end)
            raise
        self._end += len(data)
        self._unsynced = True

    def sync(self) -> None:
        if self._unsynced:
            self._unsynced = False
            os.fsync(self._file)

    def _read(self) -> int:
        """Learn what is there; returns where the next line goes."""
        end = 0
        with open(self.path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    if not line.startswith(b'{"id": '[: len(line)]):
                        raise self._foreign(number)
                    os.ftruncate(self._file, end)
                    break
                key = key_of_record(_json(line))
                if key is None:
                    raise self._foreign(number)
                self.done.add(key)
                end += len(line)
        return end

    def _foreign(self, number: int) -> ConfigError:
        return ConfigError(f"{self.path}, line {number}, is not a line of a batch's output; use another file.")


def _json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None

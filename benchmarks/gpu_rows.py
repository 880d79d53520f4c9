"""A line of `gpu.py`'s table: what was measured, beside the floor it is judged by and the goal it has.

Knows neither how it was measured nor who prints it. Lines travel from the process of a section to the one that prints
as JSON, one a line, as they come: what a section that is stopped had found until then is kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from gpu_timing import Device


@dataclass(frozen=True, slots=True)
class Profile:
    """Why a line is as it is. kernels: (name, share of the device's busy time, calls), the longest first. idle: the
    share of the time from the first kernel to the last in which the device did nothing; None = no kernel was seen.
    """

    kernels: tuple[tuple[str, float, int], ...]
    idle: float | None


@dataclass(frozen=True, slots=True)
class Row:
    """measured and floor are in `unit`; floor_of says what the floor is. share: what the goal is about, at least `goal`
    of it (at_most: no more). wrong: a result was not what it should be, and nothing of it counts.
    """

    what: str
    shape: str = ""
    measured: float | None = None
    unit: str = ""
    floor: float | None = None
    floor_of: str = ""
    share: float | None = None
    goal: float | None = None
    at_most: bool = False
    note: str = ""
    wrong: bool = False
    profile: Profile | None = None

    @property
    def met(self) -> bool | None:
        """None: there is no goal, or it was not measured."""
        if self.goal is None or (self.share is None and not self.wrong):
            return None
        if self.wrong or self.share is None:
            return False
        return self.share <= self.goal if self.at_most else self.share >= self.goal

    def document(self) -> dict[str, Any]:
        return asdict(self) | {"met": self.met}

    @staticmethod
    def read(document: dict[str, Any]) -> Row:
        found = {name: value for name, value in document.items() if name != "met"}
        if found.get("profile"):
            kernels = tuple((name, share, calls) for name, share, calls in found["profile"]["kernels"])
            found["profile"] = Profile(kernels, found["profile"]["idle"])
        return Row(**found)


@dataclass
class Bench:
    """What a section gets. device: where tensors go; tiny: shapes that mean nothing, to see that all of it runs.

    known: figures by name, of this section and of those before it. `row` and `figure` say at once what was found;
    where a goal is missed and there is `why`, that is called for the profile.
    """

    device: torch.device
    tiny: bool
    known: dict[str, float] = field(default_factory=dict)
    into: Path | None = None
    rows: list[Row] = field(default_factory=list)

    @property
    def rates(self) -> Device:
        """Of the device, as the first section measured them."""
        return Device(self.known["copy"], self.known["matmul"], self.known["read"])

    def row(self, row: Row, why: Callable[[], Profile] | None = None) -> None:
        if row.met is False and not row.wrong and why is not None:
            row = replace(row, profile=why())
        self.rows.append(row)
        self._write({"row": row.document()})

    def figure(self, name: str, value: float) -> None:
        self.known[name] = value
        self._write({"figure": [name, value]})

    def checked(self, what: str, shape: str, check: Callable[[], None]) -> bool:
        """Whether `check` raised no AssertionError; if it did, there is a row that says so."""
        try:
            check()
        except AssertionError as error:
            self.row(Row(what, shape, wrong=True, note=" ".join(str(error).split())[:300] or "differs"))
            return False
        return True

    def _write(self, line: dict[str, Any]) -> None:
        if self.into is not None:
            with self.into.open("a") as file:
                file.write(json.dumps(line) + "\n")


def read_lines(path: Path) -> tuple[list[Row], dict[str, float]]:
    """What a section wrote: rows and figures. A last line that was cut off is left out."""
    rows: list[Row] = []
    figures: dict[str, float] = {}
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        if not line.endswith("\n"):
            break
        found = json.loads(line)
        if "row" in found:
            rows.append(Row.read(found["row"]))
        else:
            name, value = found["figure"]
            figures[name] = value
    return rows, figures

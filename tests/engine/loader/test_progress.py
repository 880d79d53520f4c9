from __future__ import annotations

import io

import pytest

from octavo.engine.loader import progress
from octavo.engine.loader.progress import Silent, Terminal


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SECONDS_PER_LINE", 0.0)
    out = io.StringIO()
    shown = Terminal(out)
    shown.start(4_000_000, "Loading")
    shown.advance(1_000_000)
    shown.done()
    first, second, third = out.getvalue().splitlines()
    assert first == "Loading … (4.0 MB)"
    assert second == "Loading: 1.0 MB of 4.0 MB"
    assert third.startswith("Loading: 1.0 MB in 0.0 s")


def test_few_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    shown = Terminal(out)
    shown.start(None, "Loading")
    for _ in range(1000):
        shown.advance(1)
    shown.done()
    assert len(out.getvalue().splitlines()) == 2


def test_bar_on_a_terminal_and_again() -> None:
    out = Screen()
    shown = Terminal(out)
    for text in ("Downloading", "Unpacking"):
        shown.start(2_000_000, text)
        shown.advance(2_000_000)
        shown.done()
    assert "Downloading" in out.getvalue()
    assert "Unpacking" in out.getvalue()
    assert "2.0/2.0" in out.getvalue()


def test_silent() -> None:
    silent = Silent()
    silent.start(1, "x")
    silent.advance(1)
    silent.done()

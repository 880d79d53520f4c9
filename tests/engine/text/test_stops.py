"""Stop strings against a definition that looks at the whole text."""

from __future__ import annotations

import time

from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.engine.text.stops import StopFinder

STOPS = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3)
PIECES = st.lists(st.tuples(st.text("abc", max_size=4), st.booleans()), max_size=12)


def naive(pieces: list[tuple[str, bool]], stops: list[str], include: bool) -> tuple[str, str | None]:
    text = "".join(piece for piece, _ in pieces)
    armed = [flag for piece, flag in pieces for _ in piece]
    for end in range(1, len(text) + 1):
        for stop in stops:
            if armed[end - 1] and text[:end].endswith(stop):
                return text[: end if include else end - len(stop)], stop
    return text, None


@given(stops=STOPS, pieces=PIECES, include=st.booleans())
@settings(max_examples=400, deadline=None)
def test_finds_what_the_definition_finds_and_leaks_nothing(
    stops: list[str], pieces: list[tuple[str, bool]], include: bool
) -> None:
    expected, expected_stop = naive(pieces, stops, include)
    finder, out, found = StopFinder(stops, include), "", None
    for piece, armed in pieces:
        shown, found = finder.push(piece, armed)
        out += shown
        assert expected.startswith(out)  # never shown: anything that a stop string turns out to take away
        if found is not None:
            break
    if found is None:
        out += finder.flush()
    assert (out, found) == (expected, expected_stop)


@given(stops=STOPS, text=st.text("abc", max_size=20))
@settings(max_examples=200, deadline=None)
def test_holds_back_no_more_than_it_must(stops: list[str], text: str) -> None:
    finder, out = StopFinder(stops), ""
    for end, char in enumerate(text, 1):
        shown, found = finder.push(char)
        out += shown
        if found is not None:
            return
        begun = max((k for k in range(6) if any(s[:k] == text[:end][-k:] and k for s in stops)), default=0)
        assert len(out) == end - begun


def test_stop_string_over_many_pieces() -> None:
    finder = StopFinder(["\n\nUser:", "END"])
    shown = [finder.push(piece) for piece in ("Hi\n", "\nUs", "ing it", "\n", "\nUser", ":x")]
    assert shown == [("Hi", None), ("", None), ("\n\nUsing it", None), ("", None), ("", None), ("", "\n\nUser:")]


def test_ties_go_to_the_first_of_the_list() -> None:
    assert StopFinder(["bc", "abc"]).push("abc") == ("a", "bc")
    assert StopFinder(["abc", "bc"]).push("abc") == ("", "abc")
    assert StopFinder(["abcd", "b"]).push("abcd") == ("a", "b")  # the one that is complete first


def test_included_stop_strings_hold_nothing_back() -> None:
    finder = StopFinder(["stop"], include_stop=True)
    assert finder.push("say st") == ("say st", None)
    assert finder.push("op it") == ("op", "stop")


def test_long_stop_strings_cost_no_more() -> None:
    def seconds(length: int) -> float:
        finder = StopFinder(["a" * length + "b"])
        started = time.perf_counter()
        for _ in range(4000):
            finder.push("a")
        return time.perf_counter() - started

    assert min(seconds(4000) for _ in range(3)) < 20 * min(seconds(4) for _ in range(3))

"""StopFinder: finds stop strings in text that arrives in pieces, and lets no part of one out before it is decided.

Knows strings only. The definition: read character by character, the text stops at the first character with which a stop
string ends; if several end there, the first of the list is the one.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopFinder:
    """One text's search. Work per character is O(number of stop strings), however long they are (Knuth-Morris-Pratt).

    include_stop: the text that is let out ends behind the stop string instead of before it; then nothing is held back.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include_stop
        self._fallbacks = [_fallbacks(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)  # how much of each stop string the text read so far ends with
        self._held = ""

    def push(self, text: str, armed: bool = True) -> tuple[str, str | None]:
        """Read `text`; → (text let out, stop string found or None). After a find, push nothing more.

        Unarmed, a stop string that ends in `text` is passed over; one that has begun there may still end later.
        """
        if not self._stops:
            return text, None
        for at, char in enumerate(text):
            stop = self._read(char, armed)
            if stop is not None:
                seen = self._held + text[: at + 1]
                self._held = ""
                return seen if self._include else seen[: len(seen) - len(stop)], stop
        if self._include:
            return text, None
        seen = self._held + text
        sure = len(seen) - max(self._matched)
        self._held = seen[sure:]
        return seen[:sure], None

    def flush(self) -> str:
        """The text ends here: what was held back is let out."""
        held, self._held = self._held, ""
        return held

    def _read(self, char: str, armed: bool) -> str | None:
        found: str | None = None
        for number, stop in enumerate(self._stops):
            fallbacks, matched = self._fallbacks[number], self._matched[number]
            while matched and stop[matched] != char:
                matched = fallbacks[matched - 1]
            if stop[matched] == char:
                matched += 1
            if matched == len(stop):
                if armed and found is None:
                    found = stop
                matched = fallbacks[-1]
            self._matched[number] = matched
        return found


def _fallbacks(stop: str) -> list[int]:
    """For each prefix of `stop`, the length of its longest proper suffix that is a prefix too."""
    lengths = [0] * len(stop)
    matched = 0
    for at in range(1, len(stop)):
        while matched and stop[at] != stop[matched]:
            matched = lengths[matched - 1]
        if stop[at] == stop[matched]:
            matched += 1
        lengths[at] = matched
    return lengths

"""Tape: text that grows at one end while it is read at the other, so that readers can be written as if all were there.

A reader is one generator over a tape; it yields whenever it needs text that has not come yet. What it finds depends on
the characters alone, never on how they came, as long as it decides by what `peek` and its like give.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from typing import TypeAlias, TypeVar

from octavo.cluster.ingress.reading.parts import Answer, CallArguments, CallBegun, Part, Reasoning

T = TypeVar("T")
# A generator that gives way for more text, and in the end returns T.
Reads: TypeAlias = Generator[None, None, T]

_SPACES = re.compile(r"\s*")


class Malformed(Exception):
    """The text is not what it seemed to be. Raised where the first wrong character is next, or the end."""


class CutOff(Malformed):
    """The text ends too early."""


class Tape:
    def __init__(self) -> None:
        self.parts: list[Part] = []
        self._text = ""
        self._at = 0
        self._mark: int | None = None
        self._ended = False

    def add(self, text: str, ended: bool) -> None:
        """What comes next. `ended`: nothing else will."""
        done = self._at if self._mark is None else self._mark
        self._text = self._text[done:] + text
        self._at -= done
        if self._mark is not None:
            self._mark = 0
        self._ended = ended

    # ---- going back

    def mark(self) -> None:
        """Here is where `rewind` goes."""
        self._mark = self._at

    def unmark(self) -> None:
        self._mark = None

    @property
    def is_marked(self) -> bool:
        return self._mark is not None

    def rewind(self) -> bool:
        """Back to the mark, which is gone then; False if there is none."""
        if self._mark is None:
            return False
        self._at, self._mark = self._mark, None
        return True

    # ---- reading

    def peek(self) -> Reads[str]:
        """The next character, "" at the end."""
        while self._at == len(self._text):
            if self._ended:
                return ""
            yield
        return self._text[self._at]

    def take(self) -> str:
        """The next character, which `peek` has shown."""
        self._at += 1
        return self._text[self._at - 1]

    def run(self, pattern: re.Pattern[str]) -> str:
        """What matches here of the text that is there; "" if nothing does."""
        match = pattern.match(self._text, self._at)
        if match is None:
            return ""
        self._at = match.end()
        return match[0]

    def all_of(self, pattern: re.Pattern[str]) -> Reads[str]:
        """Characters of a kind, as many as there will be: `pattern` matches any number of them."""
        found = ""
        while (yield from self.peek()) and (some := self.run(pattern)):
            found += some
        return found

    def spaces(self) -> Reads[str]:
        return (yield from self.all_of(_SPACES))

    def literal(self, text: str) -> Reads[bool]:
        """Whether `text` comes here; it is taken then, and else nothing is."""
        while not self._text.startswith(text, self._at):
            if self._ended or not self._begins(text):
                return False
            yield
        self._at += len(text)
        return True

    def expect(self, text: str) -> Reads[None]:
        if not (yield from self.literal(text)):
            raise CutOff if self._begins(text) else Malformed

    def is_cut_off_in(self, text: str) -> bool:
        """Whether the text ends inside `text`, which begins here."""
        return self._ended and self._begins(text)

    def back(self, text: str) -> None:
        """Un-take `text`, which was taken last."""
        if self._at < len(text):  # some of it was dropped since
            self._text, self._at = text + self._text[self._at :], 0
        else:
            self._at -= len(text)

    def _begins(self, text: str) -> bool:
        """Whether all that is left is the beginning of `text`."""
        return text.startswith(self._text[self._at : self._at + len(text)])

    # ---- what was found

    def found(self) -> list[Part]:
        """The parts since the last time, those of one kind that follow each other as one."""
        parts, self.parts = self.parts, []
        return merge(parts)


def merge(parts: list[Part]) -> list[Part]:
    """Parts of one kind that follow each other, as one; empty ones left out."""
    result: list[Part] = []
    for part in parts:
        last = result[-1] if result else None
        match part, last:
            case Answer(more), Answer(text):
                result[-1] = Answer(text + more)
            case Reasoning(more), Reasoning(text):
                result[-1] = Reasoning(text + more)
            case CallArguments(index, more), CallArguments(same, text) if index == same:
                result[-1] = CallArguments(index, text + more)
            case _ if isinstance(part, CallBegun) or part.text:
                result.append(part)
    return result

"""What a model's answer is made of: thoughts, text, calls of tools. And the reader that finds nothing but text.

Knows neither tokens nor the shapes of HTTP bodies. Which reader a model needs is the business of `readers.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias


@dataclass(frozen=True, slots=True)
class Reasoning:
    """More of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class Answer:
    """More of what the model says to the user."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """The model calls the tool `name`. `index` counts the calls of one choice from 0; `call_id` is unique."""

    index: int
    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the arguments of call `index`; all of them, joined, are the JSON text of an object.

    An answer that was cut off (finish reason "length") leaves the text unfinished.
    """

    index: int
    text: str


Part: TypeAlias = Reasoning | Answer | CallBegun | CallArguments


class Reader(Protocol):
    """Reads one choice. What it gives does not depend on where the text was cut into pieces, once parts of one kind
    that follow each other are joined.
    """

    def push(self, text: str, ended: bool) -> list[Part]:
        """The parts that `text`, which follows what was pushed before, makes certain. `ended`: there is no more."""
        ...


class PlainReader:
    """All text is the answer."""

    def push(self, text: str, ended: bool) -> list[Part]:
        return [Answer(text)] if text else []

"""An answer as passages: runs of parts of one kind, each begun, grown and ended. What vendors with typed answers show.

Knows no vendor's names. Passages hold all that the parts say, but for white space that stands alone between thoughts
and calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from octavo.cluster.ingress.generation import Piece
from octavo.cluster.ingress.reading.parts import Answer, CallArguments, CallBegun, Part, Reader, Reasoning
from octavo.engine.types import TokenLogprobs


@dataclass(slots=True)
class Passage:
    """`number` counts the passages of one answer from 0. call_id, name: of a call, whose text is its arguments.
    logprobs: of a text's tokens, as far as the client asked for them.
    """

    kind: Literal["reasoning", "text", "call"]
    number: int
    call_id: str = ""
    name: str = ""
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.texts)


@dataclass(frozen=True, slots=True)
class Begun:
    passage: Passage


@dataclass(frozen=True, slots=True)
class Grown:
    passage: Passage
    text: str
    logprobs: Sequence[TokenLogprobs]


@dataclass(frozen=True, slots=True)
class Ended:
    passage: Passage


Change: TypeAlias = Begun | Grown | Ended


class Passages:
    """The passages of one answer, of which the last one may be open. Once its last piece was pushed, there is at least
    one, and none is open.
    """

    def __init__(self, reader: Reader) -> None:
        self.all: list[Passage] = []
        self._reader = reader
        self._open: Passage | None = None
        self._blank = ""  # white space that will begin a text if more of it comes
        self._logprobs: list[TokenLogprobs] = []  # of tokens whose text has not come yet

    def push(self, piece: Piece) -> list[Change]:
        """What `piece`, which follows those pushed before, changes."""
        ended = piece.finish_reason is not None
        parts = self._reader.push(piece.text, ended)
        self._logprobs.extend(piece.logprobs)
        changes = [change for part in parts for change in self._read(part)]
        if ended:
            if not self.all:
                changes.extend(self._grow("text", self._blank))
            changes.extend(self._end())
        return changes

    def _read(self, part: Part) -> Iterator[Change]:
        match part:
            case Reasoning(text):
                yield from self._grow("reasoning", text)
            case Answer(text):
                text = self._blank + text
                if self._is_open("text") or (text and not text.isspace()):
                    self._blank = ""
                    yield from self._grow("text", text)
                else:
                    self._blank = text
            case CallBegun(_, call_id, name):
                yield from self._begin(Passage("call", len(self.all), call_id, name))
            case CallArguments(_, text):
                yield from self._grow("call", text)

    def _grow(self, kind: Literal["reasoning", "text", "call"], text: str) -> Iterator[Change]:
        if not self._is_open(kind):
            yield from self._begin(Passage(kind, len(self.all)))
        passage = self._open
        assert passage is not None
        logprobs, self._logprobs = self._logprobs, []
        if kind == "text":
            passage.logprobs.extend(logprobs)
        if text:
            passage.texts.append(text)
            yield Grown(passage, text, logprobs if kind == "text" else ())

    def _begin(self, passage: Passage) -> Iterator[Change]:
        yield from self._end()
        self._blank = ""
        self._open = passage
        self.all.append(passage)
        yield Begun(passage)

    def _end(self) -> Iterator[Change]:
        if self._open is not None:
            yield Ended(self._open)
        self._open = None

    def _is_open(self, kind: str) -> bool:
        return self._open is not None and self._open.kind == kind

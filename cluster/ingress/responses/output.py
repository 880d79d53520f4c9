"""The output of a response: its items, and the events in which they come.

Both are made of the same passages, so that a client which adds the events up has the items.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from octavo.cluster.ingress.generation import Piece
from octavo.cluster.ingress.logprobs import TokenNames, chat_logprobs
from octavo.cluster.ingress.reading.parts import Reader
from octavo.cluster.ingress.reading.passages import Begun, Change, Grown, Passage, Passages
from octavo.engine.types import TokenLogprobs

_PREFIXES = {"reasoning": "rs", "text": "msg", "call": "fc"}


def new_id(prefix: str) -> str:
    """Unguessable: who knows the id of something stored may read it."""
    return f"{prefix}_{secrets.token_hex(24)}"


@dataclass(frozen=True, slots=True)
class _Names:
    """What one kind of passage is called. text: the events of its text. field: where they have all of it. part, index:
    the events of the part of an item that holds the text, and its place there; a call has none. kind: the part's type.
    """

    text: str
    field: str
    part: str = ""
    index: str = ""
    kind: str = ""


_TEXT = _Names("response.output_text", "text", "response.content_part", "content_index", "output_text")
_THOUGHT = _Names("response.reasoning_text", "text", "response.content_part", "content_index", "reasoning_text")
_SUMMARY = _Names(
    "response.reasoning_summary_text", "text", "response.reasoning_summary_part", "summary_index", "summary_text"
)
_CALL = _Names("response.function_call_arguments", "arguments")


class Output:
    """Items are complete but for the last one, which may be cut off (status incomplete).

    as_summary: thoughts are shown as a reasoning item's summary, not as its content. top_logprobs: so many per token of
    a text, where there are any.
    """

    def __init__(self, reader: Reader, names: TokenNames, *, as_summary: bool, top_logprobs: int) -> None:
        self._passages = Passages(reader)
        self._ids: list[str] = []  # of the items
        self._token_names = names
        self._top_logprobs = top_logprobs
        self._names = {"text": _TEXT, "call": _CALL, "reasoning": _SUMMARY if as_summary else _THOUGHT}
        self._is_cut_off = True

    @property
    def items(self) -> list[dict[str, Any]]:
        return [self._item(passage, self._status(passage)) for passage in self._passages.all]

    def push(self, piece: Piece) -> list[Change]:
        """Take `piece`, which follows those pushed before."""
        changes = self._passages.push(piece)
        self._ids.extend(new_id(_PREFIXES[passage.kind]) for passage in self._passages.all[len(self._ids) :])
        self._is_cut_off = piece.finish_reason in (None, "length")
        return changes

    def events(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """The same, with the events it makes; without sequence numbers. To be iterated to the end."""
        for change in self.push(piece):
            yield from self._events(change)

    def _events(self, change: Change) -> Iterator[dict[str, Any]]:
        passage = change.passage
        names = self._names[passage.kind]
        item = {"output_index": passage.number}
        place = {"item_id": self._ids[passage.number], **item}
        if names.index:
            place[names.index] = 0
        match change:
            case Begun():
                # The passage has grown by all of its piece already, which the events to come say once more.
                empty = Passage(passage.kind, passage.number, passage.call_id, passage.name)
                yield {"type": "response.output_item.added", **item, "item": self._item(empty, "in_progress")}
                if names.part:
                    yield {"type": f"{names.part}.added", **place, "part": self._part(empty)}
            case Grown(_, text, logprobs):
                yield {"type": f"{names.text}.delta", **place, "delta": text, **self._scores(passage, logprobs)}
            case _:
                scores = self._scores(passage, passage.logprobs)
                yield {"type": f"{names.text}.done", **place, names.field: passage.text, **scores}
                if names.part:
                    yield {"type": f"{names.part}.done", **place, "part": self._part(passage)}
                done = self._item(passage, self._status(passage))
                yield {"type": "response.output_item.done", **item, "item": done}

    def _status(self, passage: Passage) -> str:
        return "incomplete" if self._is_cut_off and passage is self._passages.all[-1] else "completed"

    def _item(self, passage: Passage, status: str) -> dict[str, Any]:
        head = {"id": self._ids[passage.number], "status": status}
        parts = [] if status == "in_progress" else [self._part(passage)]
        match passage.kind:
            case "text":
                return {**head, "type": "message", "role": "assistant", "content": parts}
            case "call":
                call = {"call_id": passage.call_id, "name": passage.name, "arguments": passage.text}
                return {**head, "type": "function_call", **call}
            case "reasoning":
                is_summary = self._names["reasoning"] is _SUMMARY
                shown = {"summary": parts} if is_summary else {"summary": [], "content": parts}
                return {**head, "type": "reasoning", **shown}

    def _part(self, passage: Passage) -> dict[str, Any]:
        part = {"type": self._names[passage.kind].kind, "text": passage.text}
        if passage.kind == "text":
            return {**part, "annotations": [], **self._scores(passage, passage.logprobs)}
        return part

    def _scores(self, passage: Passage, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        if passage.kind != "text":
            return {}
        return {"logprobs": chat_logprobs(entries, self._top_logprobs, self._token_names, False)["content"]}

"""The shapes of /v1/messages: a message of content blocks, and the events in which it comes.

Both are made of the same passages, so that a client which adds the events up has the message.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pydantic_core import from_json

from octavo.cluster.ingress import replies
from octavo.cluster.ingress.errors import Failure
from octavo.cluster.ingress.generation import Generation, Piece
from octavo.cluster.ingress.messages.body import MessagesBody
from octavo.cluster.ingress.messages.errors import enveloped
from octavo.cluster.ingress.reading.passages import Begun, Change, Grown, Passage, Passages

# Thoughts are not signed, but clients take those without a signature for redacted and do not send them back.
SIGNATURE = "unsigned"


class MessagesDialect:
    form = replies.NAMED_EVENTS

    def __init__(
        self, body: MessagesBody, generation: Generation, *, answer_id: str, model: str, request_id: str
    ) -> None:
        self._body = body
        self._generation = generation
        self._request_id = request_id
        self._passages = Passages(generation.readers[0])
        self._stop: dict[str, Any] = {"stop_reason": None, "stop_sequence": None}
        self._head = {"id": answer_id, "type": "message", "role": "assistant", "model": model}

    def opening(self) -> Iterable[dict[str, Any]]:
        """What was found in the cache is not known yet: message_delta says it, as it says what was generated."""
        usage = _usage(self._generation.usage())
        yield {"type": "message_start", "message": {**self._head, "content": [], **self._stop, "usage": usage}}
        yield {"type": "ping"}

    def chunks(self, piece: Piece) -> Iterable[dict[str, Any]]:
        return [event for change in self._push(piece) for event in self._events(change)]

    def closing(self, usage: dict[str, Any]) -> Iterable[dict[str, Any]]:
        yield {"type": "message_delta", "delta": self._stop, "usage": _usage(usage)}
        yield {"type": "message_stop"}

    def failed(self, failure: Failure) -> Iterable[dict[str, Any]]:
        yield enveloped(failure, self._request_id).body

    def whole(self, pieces: Sequence[Sequence[Piece]], usage: dict[str, Any]) -> dict[str, Any]:
        for piece in pieces[0]:
            self._push(piece)
        content = [self._block(passage) for passage in self._passages.all]
        return {**self._head, "content": content, **self._stop, "usage": _usage(usage)}

    def _push(self, piece: Piece) -> list[Change]:
        changes = self._passages.push(piece)
        if piece.finish_reason is not None:
            self._stop = self._stopped(piece)
        return changes

    def _stopped(self, last: Piece) -> dict[str, Any]:
        if last.finish_reason == "length":
            is_asked = self._generation.requests[0].params.max_tokens == self._body.max_tokens
            reason = "max_tokens" if is_asked else "model_context_window_exceeded"
            return {"stop_reason": reason, "stop_sequence": None}
        if isinstance(last.stop_reason, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": last.stop_reason}
        calls = any(passage.kind == "call" for passage in self._passages.all)
        return {"stop_reason": "tool_use" if calls else "end_turn", "stop_sequence": None}

    def _block(self, passage: Passage) -> dict[str, Any]:
        match passage.kind:
            case "text":
                return {"type": "text", "text": passage.text}
            case "reasoning":
                return {"type": "thinking", "thinking": self._thought(passage.text), "signature": SIGNATURE}
            case "call":
                return {"type": "tool_use", "id": passage.call_id, "name": passage.name, "input": _input(passage.text)}

    def _events(self, change: Change) -> Iterable[dict[str, Any]]:
        passage = change.passage
        place = {"index": passage.number}
        match change:
            case Begun():
                yield {"type": "content_block_start", **place, "content_block": _begun(passage)}
            case Grown(_, text, _):
                if delta := self._delta(passage, text):
                    yield {"type": "content_block_delta", **place, "delta": delta}
            case _:
                if passage.kind == "reasoning":
                    delta = {"type": "signature_delta", "signature": SIGNATURE}
                    yield {"type": "content_block_delta", **place, "delta": delta}
                yield {"type": "content_block_stop", **place}

    def _delta(self, passage: Passage, text: str) -> dict[str, Any] | None:
        match passage.kind:
            case "text":
                return {"type": "text_delta", "text": text}
            case "reasoning":
                thought = self._thought(text)
                return {"type": "thinking_delta", "thinking": thought} if thought else None
            case "call":
                return {"type": "input_json_delta", "partial_json": text}

    def _thought(self, text: str) -> str:
        return text if self._body.shows_thinking else ""


def _input(arguments: str) -> dict[str, Any]:
    """Of an answer that was cut off, as much as there is: so the official client reads what it was streamed."""
    try:
        value = from_json(arguments or "{}", allow_partial=True)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _begun(passage: Passage) -> dict[str, Any]:
    match passage.kind:
        case "text":
            return {"type": "text", "text": ""}
        case "reasoning":
            return {"type": "thinking", "thinking": "", "signature": ""}
        case "call":
            return {"type": "tool_use", "id": passage.call_id, "name": passage.name, "input": {}}


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    """Input tokens are those that were not found in the cache."""
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"] - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"thinking_tokens": replies.reasoning_tokens(usage)},
    }

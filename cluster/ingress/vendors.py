"""What the bodies of vendors have in common who call the chat by other names: OpenAI's responses, Anthropic's messages.

Such a body becomes a ChatBody, so that all that chat can do is there too. Here is how a conversation is put together
for it, which of our own sampling fields go along, and how an error of the chat's is said in the vendor's words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from octavo.cluster.ingress.protocol import Beyond, ChatBody, DrawnBody, body_of
from octavo.engine.errors import RequestError


def objects(value: Any) -> list[dict[str, Any]]:
    """A list of JSON objects, to be looked at later. Raises ValueError."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError("must be a list of objects")
    return value


class VendorBody(DrawnBody):
    """Fields beyond the vendor's own; they mean what they mean in chat completions."""

    chat_template_kwargs: dict[str, Any] | None = None

    def chat_body(self, values: Mapping[str, Any]) -> ChatBody:
        """The chat body with these values and, unless they are among them, the fields above."""
        shared = {name: getattr(self, name) for name in VendorBody.model_fields}
        given = {**shared, **values}
        body = body_of(ChatBody, {name: value for name, value in given.items() if value is not None})
        body.beyond = Beyond(within_context=True)
        return body


Words: TypeAlias = Sequence[tuple[re.Pattern[str], str]]


def words(*pairs: tuple[str, str]) -> Words:
    """`pairs`: what chat calls something, as a pattern, and what the vendor calls it."""
    return tuple((re.compile(pattern), theirs) for pattern, theirs in pairs)


@contextmanager
def in_words(of: Words) -> Iterator[None]:
    """Errors raised inside about the chat body name the vendor's fields."""

    def said(text: str) -> str:
        for pattern, theirs in of:
            text = pattern.sub(theirs, text)
        return text

    try:
        yield
    except RequestError as error:
        raise type(error)(said(error.message), error.param and said(error.param)) from error


class Conversation:
    """Puts chat messages together. `place`: where in the client's body something stands, for errors."""

    def __init__(self) -> None:
        self._messages: list[dict[str, Any]] = []
        self._calls: dict[str, str] = {}  # id → the tool's name

    def messages(self) -> list[dict[str, Any]]:
        return self._messages

    def instruct(self, text: str) -> None:
        """What the model is to do. Templates want that first and in one message, so what begins the talk is joined."""
        last = self._last("system")
        if last is not None and len(self._messages) == 1:
            last["content"] += f"\n\n{text}"
        else:
            self._messages.append({"role": "system", "content": text})

    def ask(self, text: str, *, goes_on: bool = False) -> None:
        """goes_on: what the user says twice in a row is one turn."""
        last = self._last("user")
        if goes_on and last is not None:
            last["content"] += f"\n\n{text}"
        else:
            self._messages.append({"role": "user", "content": text})

    def think(self, text: str) -> None:
        """What the model thought. Thoughts, text and calls that follow each other in this order are one turn."""
        turn = self._last("assistant")
        if turn is None or turn["content"] or "tool_calls" in turn:
            turn = self._turn()
        turn["reasoning_content"] = turn.get("reasoning_content", "") + text

    def answer(self, text: str, *, goes_on: bool = False) -> None:
        """goes_on: texts in a row are one."""
        turn = self._last("assistant")
        if turn is None or "tool_calls" in turn or (turn["content"] and not goes_on):
            turn = self._turn()
        turn["content"] += text

    def call(self, call_id: str, name: str, arguments: str) -> None:
        turn = self._last("assistant") or self._turn()
        function = {"name": name, "arguments": arguments}
        turn.setdefault("tool_calls", []).append({"id": call_id, "type": "function", "function": function})
        self._calls[call_id] = name

    def result(self, call_id: str, text: str, place: str) -> None:
        """Raises RequestError where no call before has this id."""
        name = self._calls.get(call_id)
        if name is None:
            raise RequestError(f"{place} is {call_id!r}, but nothing before it has called a tool by this id.", place)
        self._messages.append({"role": "tool", "tool_call_id": call_id, "name": name, "content": text})

    def _turn(self) -> dict[str, Any]:
        self._messages.append({"role": "assistant", "content": ""})
        return self._messages[-1]

    def _last(self, role: str) -> dict[str, Any] | None:
        return self._messages[-1] if self._messages and self._messages[-1]["role"] == role else None

"""Qwen3-Coder's notation: `<tool_call><function=name><parameter=key>value</parameter> … </function></tool_call>`.

Values stand there as plain text; what they mean, the schema of the tool says: a parameter that may only be a string is
one, and any other is read as JSON or as Python's True, False and None if it can be, and else as a string.
"""

from __future__ import annotations

import json
import re
from typing import Any

from octavo.cluster.ingress.reading.calls import CallReader
from octavo.cluster.ingress.reading.tape import CutOff, Malformed, Reads

_NAME = re.compile(r"[^>\s<]*")
_UP_TO_TAG = re.compile(r"[^<\s]*")
_END_OF_VALUE = "</parameter>"
_PYTHON = {"True": "true", "False": "false", "None": "null"}


class QwenCoderReader(CallReader):
    MARKERS = ("<tool_call>", "<function=")

    def call(self, opener: str) -> Reads[None]:
        tape = self.tape
        if opener == "<tool_call>":
            yield from tape.spaces()
            yield from tape.expect("<function=")
        name = yield from self._name()
        yield from tape.spaces()
        has_more = yield from self._has_more()
        emit = self.begin(name)
        emit("{")
        comma = ""
        while has_more:
            key = yield from self._name()
            emit(comma + json.dumps(key, ensure_ascii=False) + ": ")
            comma = ", "
            if self._is_string(name, key):
                emit('"')
                yield from self._value(lambda text: emit(json.dumps(text, ensure_ascii=False)[1:-1]))
                emit('"')
            else:
                found: list[str] = []
                yield from self._value(found.append)
                emit(_as_json("".join(found)))
            yield from tape.spaces()
            has_more = yield from self._has_more()
        emit("}")
        self.complete()
        yield from tape.spaces()
        yield from tape.literal("</tool_call>")

    def _name(self) -> Reads[str]:
        name = yield from self.tape.all_of(_NAME)
        yield from self.tape.expect(">")
        if not name:
            raise Malformed
        return name

    def _has_more(self) -> Reads[bool]:
        if (yield from self.tape.literal("<parameter=")):
            return True
        yield from self.tape.expect("</function>")
        return False

    def _value(self, emit: Any) -> Reads[None]:
        """Text up to the closing tag, without the one line end that stands on either side."""
        tape = self.tape
        yield from tape.literal("\n")
        spaces = ""
        while not (yield from tape.literal(_END_OF_VALUE)):
            char = yield from tape.peek()
            if not char:
                raise CutOff
            if char.isspace():
                spaces += tape.take()
            else:
                emit(spaces + (tape.run(_UP_TO_TAG) or tape.take()))
                spaces = ""
        emit(spaces.removesuffix("\n"))

    def _is_string(self, name: str, key: str) -> bool:
        properties = self.offer.get(name, {}).get("properties")
        schema = properties.get(key) if isinstance(properties, dict) else None
        return isinstance(schema, dict) and schema.get("type") == "string"


def _as_json(text: str) -> str:
    """What the text means."""
    if text in _PYTHON:
        return _PYTHON[text]
    try:
        return json.dumps(json.loads(text, parse_constant=_refuse), ensure_ascii=False)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")

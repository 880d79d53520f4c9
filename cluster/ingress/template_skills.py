"""What a chat template can do with tools, found by trying: whether it writes them, and calls, and how.

Templates differ in what they take: several calls in one turn, arguments as objects or as text, ids of nine characters,
no content or an empty one. What works in a made-up conversation is what real ones get. And as the template writes a
call, so does the model: the reader that reads it is the right one.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from octavo.cluster.ingress.reading.formats import CALL_FORMATS, CallFormat
from octavo.cluster.ingress.reading.parts import Answer, CallArguments, CallBegun
from octavo.engine.errors import RequestError

Messages = Sequence[Mapping[str, Any]]

_TOOL, _RESULT = "octavo_looks_for_this", "octavo_looks_for_that"
_ASKED = "octavo_asks"
_ASK = {"role": "user", "content": _ASKED}
_ARGUMENTS = {"place": "Bonn"}
_SCHEMA = {
    "type": "object",
    "properties": {"place": {"type": "string", "description": "A city."}},
    "required": ["place"],
}
_FUNCTION = {"name": _TOOL, "description": "Nothing.", "parameters": _SCHEMA}
_TOOLS = [{"type": "function", "function": _FUNCTION}]
_LONG_ID = "call_0123456789"  # Mistral's templates want nine letters and digits
_SHORT_ID = "abcdefgh"
# Where nothing shows it: what a template writes → the notation of the calls it teaches.
_SIGNS = (("<｜tool▁calls▁begin｜>", "```json"), "deepseek_v3"), (("<｜tool▁calls▁begin｜>",), "deepseek_v31")


class Render(Protocol):
    """The template at work. Raises RequestError for what it does not take."""

    def __call__(
        self, messages: Messages, *, tools: Sequence[Mapping[str, Any]] | None, arguments_as_text: bool
    ) -> str: ...


@dataclass(frozen=True, slots=True)
class TemplateSkills:
    """tools: it writes tools. system: it writes system messages. calls: it writes calls of earlier turns and their
    results; parallel: several of one turn.

    How it wants calls: arguments_as_text or as objects; long_ids or nine characters; `blank` as content where there is
    none. notation: how it writes them, None if it writes none that we can read.
    """

    tools: bool
    system: bool
    calls: bool = False
    parallel: bool = False
    arguments_as_text: bool = False
    long_ids: bool = True
    blank: str | None = ""
    notation: CallFormat | None = None


def find_skills(render: Render, source: str) -> TemplateSkills:
    """`source`: the template's text, for what trying does not show."""
    tools = _TOOLS if _TOOL in _try(render, [_ASK], _TOOLS) else None
    system = _RESULT in _try(render, [{"role": "system", "content": _RESULT}, _ASK], tools)
    for as_text, long_ids, blank in itertools.product((False, True), (True, False), ("", None)):
        one = _try(render, _talk(1, long_ids, blank), tools, as_text)
        if _RESULT in one and _TOOL in one.split(_ASKED)[-1]:
            several = _try(render, _talk(2, long_ids, blank), tools, as_text)
            return TemplateSkills(
                tools=tools is not None,
                system=system,
                calls=True,
                parallel=several.count(_RESULT) > 1 and several.split(_ASKED)[-1].count(_TOOL) > 1,
                arguments_as_text=as_text,
                long_ids=long_ids,
                blank=blank,
                notation=_notation(one.split(_ASKED)[-1].split(_RESULT)[0], source),
            )
    return TemplateSkills(tools is not None, system, notation=_by_signs(source))


def _talk(calls: int, long_ids: bool, blank: str | None) -> Messages:
    """A conversation in which the assistant calls a tool, so many times in one turn."""
    ids = [(_LONG_ID if long_ids else _SHORT_ID) + str(number) for number in range(calls)]
    function = {"name": _TOOL, "arguments": json.dumps(_ARGUMENTS)}
    made = [{"id": call_id, "type": "function", "function": function} for call_id in ids]
    results = [{"role": "tool", "tool_call_id": call_id, "name": "f", "content": _RESULT} for call_id in ids]
    return [_ASK, {"role": "assistant", "content": blank, "tool_calls": made}, *results]


def _try(
    render: Render, messages: Messages, tools: Sequence[Mapping[str, Any]] | None, arguments_as_text: bool = False
) -> str:
    try:
        return render(messages, tools=tools, arguments_as_text=arguments_as_text)
    except RequestError:
        return ""


def _notation(written: str, source: str) -> CallFormat | None:
    """The notation in which the call in `written` is read as what it is, with nothing of another one before it. Those
    with marks come first.
    """
    formats = {each.name: each for each in CALL_FORMATS.values()}
    for each in sorted(formats.values(), key=lambda each: not each.trigger):
        if _calls_in(written, each) == [(_TOOL, _ARGUMENTS)]:
            return each
    return _by_signs(source)


def _calls_in(written: str, notation: CallFormat) -> list[tuple[str, Any]]:
    parts = notation.reader({_TOOL: _SCHEMA}).push(written, True)
    if parts and isinstance(parts[0], Answer) and re.search("tool|function", parts[0].text, re.IGNORECASE):
        return []
    texts = ["" for part in parts if isinstance(part, CallBegun)]
    for part in parts:
        if isinstance(part, CallArguments):
            texts[part.index] += part.text
    try:
        return [(part.name, json.loads(texts[part.index])) for part in parts if isinstance(part, CallBegun)]
    except ValueError:
        return []


def _by_signs(source: str) -> CallFormat | None:
    return next((CALL_FORMATS[name] for signs, name in _SIGNS if all(sign in source for sign in signs)), None)

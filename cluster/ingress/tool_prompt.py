"""How a model is told of tools: by its chat template, or by us where the template knows nothing of them.

What a template can do is found by trying. Where it cannot, tools are described in the system message, with an example
of the notation in which they are called; calls of earlier turns are written in that notation into the assistant's text,
and results become messages of the user's.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from octavo.cluster.ingress.protocol import text_of
from octavo.cluster.ingress.reading.formats import NAME, Shape
from octavo.cluster.ingress.tools import Tool, Tools
from octavo.engine.errors import RequestError
from octavo.engine.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Messages = Sequence[Mapping[str, Any]]

_MARK, _RESULT = "octavo_looks_for_this", "octavo_looks_for_that"
_HELLO = {"role": "user", "content": "Hello"}
_ID = "abcdefghi"  # nine characters, which Mistral's templates insist on


@dataclass(frozen=True, slots=True)
class TemplateSkills:
    """What a template writes: tools; calls and their results; several calls of one turn; system messages."""

    tools: bool
    calls: bool
    parallel: bool
    system: bool


class ToolPrompt:
    """For one model. `shape`: the notation to describe where the template describes none."""

    def __init__(self, tokenizer: Tokenizer, shape: Shape) -> None:
        self._tokenizer = tokenizer
        self._shape = shape
        self.skills = lru_cache(maxsize=16)(self._skills)

    def prepare(
        self, messages: Messages, tools: Tools | None, template: str | None
    ) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]] | None]:
        """Messages and tools as `template` (None: the model's own) takes them."""
        called = any(message["role"] == "tool" or message.get("tool_calls") for message in messages)
        if tools is None and not called:
            return list(messages), None
        skills = self.skills(template)
        prepared = list(messages)
        if called and not skills.calls:
            prepared = as_text(messages, self._shape)
        elif called and not skills.parallel:
            prepared = one_by_one(messages)
        if tools is None:
            return prepared, None
        if skills.tools:
            return prepared, [tool.definition for tool in tools.tools]
        return _instruct(prepared, describe(tools, self._shape), skills.system), None

    def _skills(self, template: str | None) -> TemplateSkills:
        tool = {"name": _MARK, "description": "None.", "parameters": {"type": "object", "properties": {}}}
        tools = [{"type": "function", "function": tool}]
        skills = TemplateSkills(
            tools=_MARK in self._try([_HELLO], tools, template),
            calls=_RESULT in (talk := self._try(_talk(1), None, template)) and _MARK in talk,
            parallel=self._try(_talk(2), None, template).count(_MARK) > 1,
            system=_MARK in self._try([{"role": "system", "content": _MARK}, _HELLO], None, template),
        )
        if not skills.tools:
            logger.warning("the chat template knows nothing of tools: requests describe them in the system message")
        return skills

    def _try(self, messages: Messages, tools: list[dict[str, Any]] | None, template: str | None) -> str:
        try:
            return self._tokenizer.apply_chat_template(messages, tools=tools, chat_template=template)
        except RequestError:
            return ""


def _talk(calls: int) -> Messages:
    """A conversation in which the assistant calls tools, so many in one turn."""
    ids = [_ID[:-1] + str(number) for number in range(calls)]
    made = [{"id": call_id, "type": "function", "function": {"name": _MARK, "arguments": {}}} for call_id in ids]
    results = [{"role": "tool", "tool_call_id": call_id, "name": "f", "content": _RESULT} for call_id in ids]
    return [_HELLO, {"role": "assistant", "content": "", "tool_calls": made}, *results]


def describe(tools: Tools, shape: Shape) -> str:
    """The tools, and how they are called, in words for the model."""
    example = (
        f'{shape.first}{shape.begin.replace(NAME, "name of the tool")}{{"argument": "value"}}{shape.end}{shape.last}'
    )
    lines = [
        "You can call tools. Each line below is one, with its arguments as a JSON Schema:",
        *(_one_line(tool) for tool in tools.tools),
        "",
        "To call a tool, write exactly this, with JSON as its arguments, and wait for the result:",
        example,
    ]
    if tools.must_call:
        lines.append(
            "You must call a tool now." if len(tools.tools) > 1 else f"You must call {tools.tools[0].name} now."
        )
    elif not tools.parallel:
        lines.append("Call one tool at a time.")
    return "\n".join(lines)


def _one_line(tool: Tool) -> str:
    line: dict[str, Any] = {"name": tool.name, "description": tool.description, "parameters": tool.schema}
    return json.dumps({name: value for name, value in line.items() if value}, ensure_ascii=False)


def _instruct(messages: list[Mapping[str, Any]], text: str, takes_system: bool) -> list[Mapping[str, Any]]:
    """`text` behind the system message; a template that takes none gets it before the first message."""
    first = messages[0]
    if first["role"] in ("system", "developer"):
        return [{**first, "content": _joined(text_of(first["content"]), text)}, *messages[1:]]
    if takes_system:
        return [{"role": "system", "content": text}, *messages]
    return [{**first, "content": _joined(text, text_of(first["content"]))}, *messages[1:]]


def as_text(messages: Messages, shape: Shape) -> list[Mapping[str, Any]]:
    """Calls as the assistant's text, results as the user's: those that follow each other as one message."""
    result: list[Mapping[str, Any]] = []
    after_result = False
    for message in messages:
        if message["role"] == "tool":
            text = f"<tool_response>\n{text_of(message['content'])}\n</tool_response>"
            if after_result:
                text = result.pop()["content"] + "\n" + text
            result.append({"role": "user", "content": text})
        elif calls := message.get("tool_calls"):
            plain = {name: value for name, value in message.items() if name != "tool_calls"}
            content = text_of(message["content"])
            result.append({**plain, "content": content + ("\n" if content else "") + _written(calls, shape)})
        else:
            result.append(message)
        after_result = message["role"] == "tool"
    return result


def one_by_one(messages: Messages) -> list[Mapping[str, Any]]:
    """Turns with several calls as turns with one each, every one followed by its result."""
    result: list[Mapping[str, Any]] = []
    left = list(messages)
    while left:
        message = left.pop(0)
        calls = message.get("tool_calls") or []
        if len(calls) < 2:
            result.append(message)
            continue
        answers = []
        while left and left[0]["role"] == "tool":
            answers.append(left.pop(0))
        for number, call in enumerate(calls):
            result.append({**message, "tool_calls": [call], "content": message["content"] if number == 0 else ""})
            own = next((at for at, each in enumerate(answers) if each.get("tool_call_id") == call.get("id")), 0)
            result += [answers.pop(own)] if answers else []
        result += answers
    return result


def _written(calls: Sequence[Mapping[str, Any]], shape: Shape) -> str:
    functions = [call["function"] for call in calls]
    texts = (shape.begin.replace(NAME, function["name"]) + function["arguments"] + shape.end for function in functions)
    return shape.first + shape.between.join(texts) + shape.last


def _joined(first: str, second: str) -> str:
    return "\n\n".join(text for text in (first, second) if text)

"""How a model is told of tools: by its chat template, or by us where the template knows nothing of them.

Where it does not, tools are described in the system message, with an example of the notation in which they are called.
Calls of earlier turns are written in that notation into the assistant's text, and results become the user's messages.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from octavo.cluster.ingress.protocol import text_of
from octavo.cluster.ingress.reading.formats import HERMES_SHAPE, NAME, CallFormat, Shape
from octavo.cluster.ingress.template_skills import Messages, TemplateSkills, find_skills
from octavo.cluster.ingress.tools import Tool, Tools
from octavo.engine.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_CODE_CHARS = 9


@dataclass(frozen=True, slots=True)
class Prepared:
    """A conversation as a template takes it; see ChatTemplates.render."""

    messages: list[Mapping[str, Any]]
    tools: list[Mapping[str, Any]] | None = None
    arguments_as_text: bool = False


class ToolPrompt:
    """For one model. `notation`: the one in which it calls tools if its template describes none; None = Hermes's."""

    def __init__(self, tokenizer: Tokenizer, notation: CallFormat | None) -> None:
        self._tokenizer = tokenizer
        self._notation = notation
        self._has_warned = False
        self.skills = lru_cache(maxsize=16)(self._skills)

    def prepare(self, messages: Messages, tools: Tools | None, template: str | None) -> Prepared:
        """Messages and tools as `template` (None: the model's own) takes them."""
        called = any(message["role"] == "tool" or message.get("tool_calls") for message in messages)
        if tools is None and not called:
            return Prepared(list(messages))
        skills = self.skills(template)
        prepared = self._with_calls(messages, skills) if called else list(messages)
        if tools is None:
            return Prepared(prepared, None, skills.arguments_as_text)
        if skills.tools:
            return Prepared(prepared, [tool.definition for tool in tools.tools], skills.arguments_as_text)
        self._warn()
        told = _instruct(prepared, describe(tools, self._shape(skills)), skills.system)
        return Prepared(told, None, skills.arguments_as_text)

    def _with_calls(self, messages: Messages, skills: TemplateSkills) -> list[Mapping[str, Any]]:
        if not skills.calls:
            return as_text(messages, self._shape(skills))
        prepared = list(messages) if skills.parallel else one_by_one(messages)
        return [_in_the_way_of(message, skills) for message in prepared]

    def _shape(self, skills: TemplateSkills) -> Shape:
        notation = self._notation or skills.notation
        return (notation.shape if notation is not None else None) or HERMES_SHAPE

    def _skills(self, template: str | None) -> TemplateSkills:
        def render(messages: Messages, *, tools: Sequence[Mapping[str, Any]] | None, arguments_as_text: bool) -> str:
            return self._tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=template, arguments_as_text=arguments_as_text
            )

        return find_skills(render, template or self._tokenizer.chat_template or "")

    def _warn(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            logger.warning("the chat template knows nothing of tools: requests describe them in the system message")


def _in_the_way_of(message: Mapping[str, Any], skills: TemplateSkills) -> Mapping[str, Any]:
    if message["role"] == "tool" and "tool_call_id" in message:
        return {**message, "tool_call_id": _id(message["tool_call_id"], skills)}
    if not message.get("tool_calls"):
        return message
    calls = [{**call, "id": _id(call["id"], skills)} if "id" in call else call for call in message["tool_calls"]]
    return {**message, "content": message["content"] or skills.blank, "tool_calls": calls}


def _id(call_id: Any, skills: TemplateSkills) -> Any:
    """Of other servers, perhaps: equal ids stay equal."""
    if skills.long_ids or (len(text := str(call_id)) == _CODE_CHARS and text.isalnum()):
        return call_id
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:_CODE_CHARS]


def describe(tools: Tools, shape: Shape) -> str:
    """The tools, and how they are called, in words for the model."""
    begin = shape.begin.replace(NAME, "name of the tool")
    example = f'{shape.first}{begin}{{"argument": "value"}}{shape.end}{shape.last}'
    lines = [
        "You can call tools. Each line below is one, with its arguments as a JSON Schema:",
        *(_one_line(tool) for tool in tools.tools),
        "",
        "To call a tool, write exactly this, with JSON as its arguments, and wait for the result:",
        example,
    ]
    if tools.must_call:
        lines.append(f"You must call {'a tool' if len(tools.tools) > 1 else tools.tools[0].name} now.")
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

"""The form of an output in which calls are enforced, as a Lark grammar for llguidance, in the model's own notation.

Knows how a notation writes calls (Shape). What the schemas mean is the grammar compiler's business.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from octavo.cluster.ingress.reading.formats import NAME, CallFormat, Shape
from octavo.cluster.ingress.tools import Tool, Tools
from octavo.engine.grammar.spec import StructuredOutputs

# A special token's text → its id; None for text that is none.
SpecialId = Callable[[str], int | None]

# As Python writes JSON, which is what models have learnt; and no white space without end.
_TIGHT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Of one turn: small models know no end.
MAX_CALLS = 32
# What the grammar cannot express of a tool's schema, the tool will check: better such a call than none.
_OF_TOOL = {**_TIGHT, "lenient": True}
_SPACE = "SPACE: /[ \\n]{1,2}/"


def form_of_calls(
    tools: Tools, notation: CallFormat, special_id: SpecialId, answer: StructuredOutputs | None
) -> StructuredOutputs | None:
    """The form of an output that calls `tools`, or else is an `answer` (None: any text); None if all is allowed.

    What tools whose calls are not enforced get as arguments is any object. A notation without a shape, or without
    anything that tells a call from text where one is to be told, leaves the output free.
    """
    shape = notation.shape
    if shape is None:
        return answer
    writer = _Writer(shape, notation.markers, special_id)
    if tools.must_call:
        return StructuredOutputs(grammar=writer.only_calls(tools, ""))
    if answer is not None:
        if answer.kind not in ("json", "json_object"):
            return answer
        schema = _answer_schema(answer)
        if shape.first or not shape.begin.startswith("{"):
            return StructuredOutputs(grammar=writer.only_calls(tools, json.dumps(schema, ensure_ascii=False)))
        return StructuredOutputs(json=_call_or_answer(tools, shape, schema))
    if notation.trigger and any(tool.strict for tool in tools.tools):
        return StructuredOutputs(grammar=writer.calls_in_text(tools, notation.trigger))
    return None


def _answer_schema(answer: StructuredOutputs) -> dict[str, Any]:
    schema: Any = json.loads(answer.json) if answer.json is not None else {"type": "object"}
    if not isinstance(schema, dict):
        schema = {} if schema else {"not": {}}
    return {**schema, "x-guidance": _TIGHT} if answer.disable_any_whitespace else schema


def _call_or_answer(tools: Tools, shape: Shape, answer: Mapping[str, Any]) -> str:
    """One JSON Schema for both, where calls are bare JSON: no grammar can tell their beginning from the answer's. There
    is place for one call.
    """
    arguments = "parameters" if '"parameters"' in shape.begin else "arguments"
    schemas = {f"call_{number}": tool.schema for number, tool in enumerate(tools.tools)} | {"answer": answer}
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.name}, arguments: {"$ref": f"#/$defs/call_{number}"}},
            "required": ["name", arguments],
            "additionalProperties": False,
        }
        for number, tool in enumerate(tools.tools)
    ]
    whole = {
        "anyOf": [*calls, {"$ref": "#/$defs/answer"}],
        "$defs": {name: _moved(schema, f"#/$defs/{name}") for name, schema in schemas.items()},
    }
    return json.dumps(whole, ensure_ascii=False)


def _moved(schema: Any, place: str) -> Any:
    """The schema as it must be when it stands at `place`: references into itself begin there."""
    if isinstance(schema, Mapping):
        return {
            key: place + value[1:]
            if key == "$ref" and isinstance(value, str) and value.startswith("#")
            else _moved(value, place)
            for key, value in schema.items()
            if key != "x-guidance"
        }
    return [_moved(item, place) for item in schema] if isinstance(schema, list) else schema


class _Writer:
    def __init__(self, shape: Shape, markers: Sequence[str], special_id: SpecialId) -> None:
        self._shape = shape
        self._ids = {marker: number for marker in markers if (number := special_id(marker)) is not None}
        self._split = re.compile("(" + "|".join(map(re.escape, self._ids)) + ")") if self._ids else None

    def only_calls(self, tools: Tools, answer: str) -> str:
        """Nothing but calls, or what the JSON Schema `answer` describes, if there is one."""
        enforced = tools.must_call
        lines = [
            "%llguidance {}",
            "start: SPACE? (calls | answer)" if answer else "start: SPACE? calls",
            _SPACE,
            f"calls: {self._calls(tools)}",
            *([f"answer: %json {answer}"] if answer else []),
            *self._rules(tools.tools, enforced),
        ]
        return "\n".join(lines)

    def calls_in_text(self, tools: Tools, trigger: str) -> str:
        """Text, in which `trigger` begins calls."""
        number = self._ids.get(trigger)
        lines = [
            "%llguidance {}",
            "start: opened* TEXT",
            "TEXT: /(.|\\n)*/",
            f"opened: opening {self._calls(tools, without=trigger)}",
        ]
        if number is not None:
            lines.append(f"opening: TEXT <[{number}]>")
        else:
            lines.append(f"opening[lazy]: TEXT {_string(trigger)}")
        return "\n".join([*lines, *self._rules(tools.tools, False, without=trigger)])

    def _calls(self, tools: Tools, without: str = "") -> str:
        shape = self._shape
        in_a_row = f"({self._literal(shape.between)} call){{0,{MAX_CALLS - 1}}}" if tools.parallel else ""
        if without and not shape.first:
            return "call"  # each has its own trigger
        first = shape.first.removeprefix(without)
        return " ".join(part for part in (self._literal(first), "call", in_a_row, self._literal(shape.last)) if part)

    def _rules(self, tools: Sequence[Tool], enforced: bool, without: str = "") -> list[str]:
        shape = self._shape
        lines = ["call: " + " | ".join(f"call_{number}" for number in range(len(tools)))]
        for number, tool in enumerate(tools):
            begin = shape.begin.replace(NAME, tool.name)
            if not shape.first:
                begin = begin.removeprefix(without)
            schema: Mapping[str, Any] = tool.schema if enforced or tool.strict else {"type": "object"}
            of_json = json.dumps({**schema, "x-guidance": _OF_TOOL}, ensure_ascii=False)
            rule = f"call_{number}: {self._literal(begin)} arguments_{number} {self._literal(shape.end)}"
            lines += [rule.rstrip(), f"arguments_{number}: %json {of_json}"]
        return lines

    def _literal(self, text: str) -> str:
        """Lark for `text`, special tokens in it by their ids."""
        parts = self._split.split(text) if self._split else [text]
        return " ".join(f"<[{self._ids[part]}]>" if part in self._ids else _string(part) for part in parts if part)


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)

"""The tools that a request offers: fields, validation, and which of them the model may, must or must not call.

Knows OpenAI's shapes, the old `functions` among them. Does not know how a model is told of tools (tool_prompt.py), nor
how it writes calls (reading/).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, PlainValidator

from octavo.engine.errors import RequestError

# As MCP has it; OpenAI takes no dots, and half the length.
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_NAME_RULE = "must be 1 to 128 of the characters A-Z, a-z, 0-9, _, - and ."
_CHOICES = ("none", "auto", "required")
_TYPES = ("string", "number", "integer", "boolean", "object", "array", "null")
# Keywords whose value is a schema, a list of schemas, or schemas by name.
_ONE = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")
_MANY = ("anyOf", "oneOf", "allOf", "prefixItems")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_DEEPEST_SCHEMA = 64


class FunctionDefinition(BaseModel):
    """parameters: a JSON Schema; None = no arguments. strict: calls must keep to it."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolDefinition(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["function"]
    function: FunctionDefinition


@dataclass(frozen=True, slots=True)
class Choice:
    """mode: as tool_choice has it, or "named": the one tool of `names` must be called. names: None = all."""

    mode: Literal["none", "auto", "required", "named"]
    names: tuple[str, ...] | None = None


def _tool_choice(value: Any) -> Choice | None:
    if value is None:
        return None
    if isinstance(value, str) and value in _CHOICES:
        return Choice(value)  # type: ignore[arg-type]  # it is one of them
    kind = value.get("type", "function") if isinstance(value, dict) else None
    if kind == "function":
        return Choice("named", (_name_in(value.get("function")),))
    allowed = value.get("allowed_tools", value) if kind == "allowed_tools" else None
    if isinstance(allowed, dict) and allowed.get("mode", "auto") in ("auto", "required"):
        tools = allowed.get("tools")
        if isinstance(tools, list) and tools:
            names = tuple(_name_in(tool.get("function", tool) if isinstance(tool, dict) else None) for tool in tools)
            return Choice(allowed.get("mode", "auto"), names)
    raise ValueError(
        'must be "none", "auto", "required", {"type": "function", "function": {"name": …}}, or {"type": '
        '"allowed_tools", "allowed_tools": {"mode": "auto" or "required", "tools": […]}}'
    )


def _function_call(value: Any) -> Choice | None:
    if value is None or value in ("none", "auto"):
        return None if value is None else Choice(value)
    if isinstance(value, dict):
        return Choice("named", (_name_in(value),))
    raise ValueError('must be "none", "auto" or {"name": …}')


def _name_in(value: Any) -> str:
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str) or not name:
        raise ValueError("must say the name of a tool")
    return name


ToolChoice = Annotated[Choice | None, PlainValidator(_tool_choice, json_schema_input_type=str | dict[str, Any] | None)]
FunctionCall = Annotated[
    Choice | None, PlainValidator(_function_call, json_schema_input_type=str | dict[str, Any] | None)
]


class ToolFields(BaseModel):
    """What a body may say about tools. `functions` and `function_call` are their old names."""

    tools: list[ToolDefinition] | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    functions: list[FunctionDefinition] | None = None
    function_call: FunctionCall = None


@dataclass(frozen=True, slots=True)
class Tool:
    """schema: of the arguments, which are an object. place: where the body has it, for errors."""

    name: str
    description: str
    schema: Mapping[str, Any]
    strict: bool
    definition: Mapping[str, Any]  # as chat templates take it
    place: str


@dataclass(frozen=True, slots=True)
class Tools:
    """At least one tool. Tools that must not be called now are not among them.

    choice: auto = the model decides; required = it calls at least one; named = it calls the one there is.
    parallel: it may call several at once.
    """

    tools: tuple[Tool, ...]
    choice: Literal["auto", "required", "named"]
    parallel: bool

    @property
    def must_call(self) -> bool:
        return self.choice != "auto"

    @property
    def offer(self) -> dict[str, Mapping[str, Any]]:
        """Name → schema of the arguments."""
        return {tool.name: tool.schema for tool in self.tools}


def tools_of(body: ToolFields) -> Tools | None:
    """The tools that the model may call; None if there are none. Raises RequestError, naming the field."""
    if body.tools and body.functions:
        raise RequestError("functions is the old name of tools: only one of them can be given.", "functions")
    chosen, field = (body.tool_choice, "tool_choice") if not body.functions else (body.function_call, "function_call")
    given = list(_definitions(body))
    tools = tuple(_tool(definition, place) for definition, place in given)
    if not tools:
        if chosen is not None and chosen.mode in ("required", "named"):
            raise RequestError(f"{field} needs tools: a list of at least one tool.", field)
        return None
    _check_names(tools)
    choice = chosen or Choice("auto")
    if choice.names is not None:
        known = {tool.name for tool in tools}
        if unknown := next((name for name in choice.names if name not in known), None):
            raise RequestError(f"{field} names the tool {unknown!r}, which is not among the tools.", field)
    if choice.mode == "none":
        return None
    parallel = body.parallel_tool_calls is not False and not body.functions and choice.mode != "named"
    return Tools(
        tuple(tool for tool in tools if choice.names is None or tool.name in choice.names), choice.mode, parallel
    )


def _definitions(body: ToolFields) -> Iterator[tuple[FunctionDefinition, str]]:
    for number, tool in enumerate(body.tools or ()):
        yield tool.function, f"tools[{number}].function"
    for number, function in enumerate(body.functions or ()):
        yield function, f"functions[{number}]"


def _tool(function: FunctionDefinition, place: str) -> Tool:
    if not _NAME.fullmatch(function.name):
        raise RequestError(f"{place}.name {_NAME_RULE}, got {function.name!r}.", f"{place}.name")
    schema = function.parameters or {}
    _check_schema(schema, f"{place}.parameters")
    kinds = schema.get("type", "object")
    if kinds != "object" and "object" not in kinds:
        raise RequestError(
            f"{place}.parameters must be the schema of an object, got type {schema['type']!r}.", f"{place}.parameters"
        )
    # templates ask whether a key is there, and most write the whole definition
    definition = {"description": "", **function.model_dump(exclude_none=True, exclude={"strict"})}
    definition["parameters"] = {"type": "object", "properties": {}} if not schema else dict(schema)
    return Tool(
        function.name,
        function.description or "",
        {**schema, "type": "object"},
        bool(function.strict),
        {"type": "function", "function": definition},
        place,
    )


def _check_names(tools: tuple[Tool, ...]) -> None:
    seen: dict[str, str] = {}
    for tool in tools:
        if first := seen.get(tool.name):
            name = f"{tool.place}.name"
            raise RequestError(f"{name} is {tool.name!r}, as {first}.name is already: names must be unique.", name)
        seen[tool.name] = tool.place


def _check_schema(schema: Any, place: str, depth: int = 0) -> None:
    """What is plainly no JSON Schema is refused; whether a grammar can be made of it, its compiler says."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise RequestError(f"{place} must be a JSON Schema: an object, true or false.", place)
    if depth > _DEEPEST_SCHEMA:
        raise RequestError(f"{place} is nested too deep.", place)
    kinds = schema.get("type", [])
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if kind not in _TYPES:
            raise RequestError(f"{place}.type must be one of {', '.join(_TYPES)}, got {kind!r}.", f"{place}.type")
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise RequestError(f"{place}.required must be a list of names.", f"{place}.required")
    for key, inner in _inner_schemas(schema, place):
        _check_schema(inner, key, depth + 1)


def _inner_schemas(schema: Mapping[str, Any], place: str) -> Iterator[tuple[str, Any]]:
    for name in _ONE:
        if name in schema and not isinstance(schema[name], list):  # a list of items is an old form of prefixItems
            yield f"{place}.{name}", schema[name]
    for name in _MANY:
        if name in schema:
            if not isinstance(schema[name], list):
                raise RequestError(f"{place}.{name} must be a list of schemas.", f"{place}.{name}")
            yield from ((f"{place}.{name}[{number}]", inner) for number, inner in enumerate(schema[name]))
    for name in _NAMED:
        if name in schema:
            if not isinstance(schema[name], dict):
                raise RequestError(f"{place}.{name} must be an object of schemas by name.", f"{place}.{name}")
            yield from ((f"{place}.{name}.{key}", inner) for key, inner in schema[name].items())


def earlier_calls(fields: dict[str, Any], place: str) -> list[dict[str, Any]]:
    """The calls of an earlier turn, taken out of the message's further `fields`: each with a function's name, and its
    arguments as JSON text. Raises RequestError, naming the field.
    """
    calls, old = fields.pop("tool_calls", None) or [], fields.pop("function_call", None)
    if not isinstance(calls, list):
        raise RequestError(f"{place}.tool_calls must be a list.", f"{place}.tool_calls")
    if old:
        return [{"type": "function", "function": _earlier_call(old, f"{place}.function_call")}]
    result = []
    for number, call in enumerate(calls):
        where = f"{place}.tool_calls[{number}]"
        if not isinstance(call, dict) or call.get("type", "function") != "function":
            raise RequestError(f"{where} must be an object with a function.", where)
        if not isinstance(call.get("id", ""), str):
            raise RequestError(f"{where}.id must be a string.", f"{where}.id")
        plain = {name: value for name, value in call.items() if name != "index" and value is not None}
        function = _earlier_call(call.get("function"), f"{where}.function")
        result.append({**plain, "type": "function", "function": function})
    return result


def _earlier_call(function: Any, place: str) -> dict[str, Any]:
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RequestError(f"{place} must be an object with a name.", place)
    arguments = function.get("arguments")
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if arguments is not None and not isinstance(arguments, str):
        raise RequestError(f"{place}.arguments must be a string that holds JSON.", f"{place}.arguments")
    return {**function, "arguments": arguments or "{}"}

"""From a body of the Responses API to a ChatBody."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from octavo.cluster.ingress.protocol import ChatBody, body_of, text_of
from octavo.cluster.ingress.responses.body import (
    ITEMS,
    FunctionCallItem,
    FunctionCallOutputItem,
    FunctionTool,
    InputBody,
    Item,
    MessageItem,
    NamedFunction,
    ReasoningItem,
    ResponsesBody,
)
from octavo.cluster.ingress.responses.output import new_id
from octavo.cluster.ingress.responses.store import StoredItem
from octavo.cluster.ingress.vendors import Conversation, words
from octavo.engine.errors import RequestError

WORDS = words(
    (r"\bmax_completion_tokens\b", "max_output_tokens"),
    (r"\bresponse_format\.json_schema\b", "text.format"),
    (r"\bresponse_format\b", "text.format"),
    (r"\breasoning_effort\b", "reasoning.effort"),
    (r"\btools\[(\d+)\]\.function\b", r"tools[\1]"),
    (r"\bmessages\b(\[\d+\])?(\.\w+)*", "input"),
)


def chat_body(body: InputBody, items: Sequence[Item], num_past: int) -> ChatBody:
    """The chat that `items` make, of which the first `num_past` are not the body's own; with what the body asks of it.
    Raises RequestError.
    """
    values: dict[str, Any] = {
        "messages": _messages(body.instructions, items, num_past),
        "tools": [_tool(tool, f"tools[{number}]") for number, tool in enumerate(body.tools or [])] or None,
        "tool_choice": _tool_choice(body.tool_choice),
        "parallel_tool_calls": body.parallel_tool_calls,
        "response_format": _response_format(body),
        "reasoning_effort": body.reasoning.effort if body.reasoning else None,
    }
    if isinstance(body, ResponsesBody):
        values["max_completion_tokens"] = body.max_output_tokens
        if body.wants_logprobs:
            values |= {"logprobs": True, "top_logprobs": body.top_logprobs}
    return body.chat_body(values)


def read_item(value: dict[str, Any], place: str) -> Item:
    """`value` as it came, at `place` of the body. Raises RequestError."""
    kind = value.get("type")
    if kind is None:
        kind = "message" if "role" in value else "item_reference"
    if not isinstance(kind, str) or kind not in ITEMS:
        known = ", ".join(ITEMS)
        raise RequestError(f"{place} is of type {kind!r}, which is not supported: {known} are.", f"{place}.type")
    return body_of(ITEMS[kind], value, place)


def stored_item(value: StoredItem) -> StoredItem:
    """A valid item of an input as it is stored and listed: with an id, and its text in parts."""
    kind = value.get("type") or "message"
    item = {**value, "id": value.get("id") or new_id("msg" if kind == "message" else "item"), "type": kind}
    if kind == "message" and not isinstance(item["content"], list):
        item["content"] = [_text_part(item["role"], item["content"] or "")]
    return item


def _text_part(role: str, text: str) -> dict[str, Any]:
    if role == "assistant":
        return {"type": "output_text", "text": text, "annotations": []}
    return {"type": "input_text", "text": text}


def _messages(instructions: str | None, items: Sequence[Item], num_past: int) -> list[dict[str, Any]]:
    conversation = Conversation()
    if instructions:
        conversation.instruct(instructions)
    for number, item in enumerate(items):
        match item:
            case MessageItem(role="user"):
                conversation.ask(text_of(item.content))
            case MessageItem(role="assistant"):
                conversation.answer(text_of(item.content))
            case MessageItem():
                conversation.instruct(text_of(item.content))
            case ReasoningItem():
                conversation.think(item.text)
            case FunctionCallItem():
                conversation.call(item.call_id, item.name, item.arguments)
            case FunctionCallOutputItem():
                conversation.result(item.call_id, text_of(item.output), f"input[{number - num_past}].call_id")
    if not items:
        raise RequestError("input is required.", "input")
    return conversation.messages()


def _tool_choice(choice: str | dict[str, Any] | None) -> Any:
    """Chat's tool_choice. Which tools are allowed, it says in these words too."""
    if not isinstance(choice, dict) or choice.get("type") == "allowed_tools":
        return choice
    if choice.get("type") != "function":
        raise RequestError(
            f"tool_choice is of type {choice.get('type')!r}, which is not supported: function and allowed_tools are.",
            "tool_choice.type",
        )
    return {"type": "function", "function": {"name": body_of(NamedFunction, choice, "tool_choice").name}}


def _tool(value: dict[str, Any], place: str) -> dict[str, Any]:
    if value.get("type") != "function":
        raise RequestError(
            f"{place} is of type {value.get('type')!r}, which is not supported: only functions are.", f"{place}.type"
        )
    tool = body_of(FunctionTool, value, place)
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": tool.strict,
    }
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}


def _response_format(body: InputBody) -> dict[str, Any] | None:
    """Responses have flat what chat has in an object of its own."""
    given = body.text.format if body.text else None
    if not given or given.get("type") != "json_schema":
        return given
    return {"type": "json_schema", "json_schema": {name: value for name, value in given.items() if name != "type"}}

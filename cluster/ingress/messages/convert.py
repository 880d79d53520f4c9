"""From a body of the Messages API to a ChatBody."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from octavo.cluster.ingress.messages.body import (
    BLOCKS,
    Block,
    CountTokensBody,
    MessagesBody,
    TextBlock,
    ThinkingBlock,
    Tool,
    ToolResultBlock,
    ToolUseBlock,
    Turn,
)
from octavo.cluster.ingress.protocol import ChatBody, body_of
from octavo.cluster.ingress.vendors import Conversation, words
from octavo.engine.errors import RequestError

WORDS = words(
    (r"\bmax_completion_tokens\b", "max_tokens"),
    (r"^stop\b(?! token)", "stop_sequences"),
    (r"\bresponse_format\.json_schema\.schema\b", "output_config.format.schema"),
    (r"\bresponse_format\b", "output_config.format"),
    (r"\breasoning_effort\b", "output_config.effort"),
    (r"\btools\[(\d+)\]\.function\.parameters\b", r"tools[\1].input_schema"),
    (r"\btools\[(\d+)\]\.function\b", r"tools[\1]"),
)


def chat_body(body: CountTokensBody) -> ChatBody:
    """Raises RequestError for what cannot be said to the model."""
    conversation = Conversation()
    if body.system:
        conversation.instruct(_text(read_blocks(body.system, "system", "system")))
    for number, turn in enumerate(body.messages):
        _say(conversation, turn, f"messages[{number}]")
    if not body.messages:
        raise RequestError("messages must not be empty.", "messages")
    values: dict[str, Any] = {
        "messages": conversation.messages(),
        "tools": [_tool(tool, f"tools[{number}]") for number, tool in enumerate(body.tools or [])] or None,
        "tool_choice": _tool_choice(body),
        "parallel_tool_calls": False if body.tool_choice and body.tool_choice.disable_parallel_tool_use else None,
        "reasoning_effort": body.output_config.effort if body.output_config else None,
        "chat_template_kwargs": _template_kwargs(body),
        "response_format": _response_format(body),
    }
    if body.messages[-1].role == "assistant":
        _check_goes_on(body.messages[-1], f"messages[{len(body.messages) - 1}]")
        values |= {"continue_final_message": True, "add_generation_prompt": False}
    if isinstance(body, MessagesBody):
        values |= {"max_completion_tokens": body.max_tokens, "stop": body.stop_sequences or body.stop}
        _check_budget(body)
    return body.chat_body(values)


def read_blocks(content: str | list[dict[str, Any]], role: str, place: str) -> list[Block]:
    """The blocks of a message of that role. Raises RequestError."""
    if isinstance(content, str):
        return [TextBlock(type="text", text=content)]
    known, blocks = BLOCKS[role], []
    for number, block in enumerate(content):
        kind, where = block.get("type"), f"{place}[{number}]"
        if not isinstance(kind, str) or kind not in known:
            raise RequestError(
                f"{where} is of type {kind!r}, which is not supported here: {', '.join(known)} "
                f"{'is' if len(known) == 1 else 'are'}.",
                f"{where}.type",
            )
        blocks.append(body_of(known[kind], block, where))
    return blocks


def _say(conversation: Conversation, turn: Turn, place: str) -> None:
    blocks = read_blocks(turn.content, turn.role, f"{place}.content")
    match turn.role:
        case "system":
            conversation.instruct(_text(blocks))
        case "user":
            for number, block in enumerate(blocks):  # results come first: they belong to the turn before
                if isinstance(block, ToolResultBlock):
                    where = f"{place}.content[{number}]"
                    conversation.result(block.tool_use_id, _result(block, where), f"{where}.tool_use_id")
            if any(isinstance(block, TextBlock) for block in blocks):
                conversation.ask(_text(blocks), goes_on=True)
        case "assistant":
            for block in blocks:
                match block:
                    case ThinkingBlock():
                        conversation.think(block.thinking)
                    case TextBlock():
                        conversation.answer(block.text, goes_on=True)
                    case ToolUseBlock():
                        conversation.call(block.id, block.name, json.dumps(block.input, ensure_ascii=False))


def _result(block: ToolResultBlock, place: str) -> str:
    text = _text(read_blocks(block.content, "system", f"{place}.content"))
    if not block.is_error:
        return text
    return f"Error: {text}" if text else "Error: the tool failed and did not say why."


def _text(blocks: Sequence[Block]) -> str:
    return "\n".join(block.text for block in blocks if isinstance(block, TextBlock))


def _tool(value: dict[str, Any], place: str) -> dict[str, Any]:
    if value.get("type") not in (None, "custom"):
        raise RequestError(
            f"{place} is of type {value['type']!r}, which is not supported: only tools with an input_schema are.",
            f"{place}.type",
        )
    tool = body_of(Tool, value, place)
    function = {"name": tool.name, "description": tool.description, "strict": tool.strict}
    given = {name: value for name, value in function.items() if value is not None}
    return {"type": "function", "function": {**given, "parameters": tool.input_schema}}


def _tool_choice(body: CountTokensBody) -> Any:
    if body.tool_choice is None:
        return None
    if body.tool_choice.type == "tool":
        if not body.tool_choice.name:
            raise RequestError("tool_choice.name is required.", "tool_choice.name")
        return {"type": "function", "function": {"name": body.tool_choice.name}}
    return {"auto": "auto", "any": "required", "none": "none"}[body.tool_choice.type]


def _template_kwargs(body: CountTokensBody) -> dict[str, Any] | None:
    """Models that may think, and may not, hear of it from their template. Without `thinking` they do as they do."""
    if body.thinking is None:
        return body.chat_template_kwargs
    return {"enable_thinking": body.thinking.type != "disabled", **(body.chat_template_kwargs or {})}


def _response_format(body: CountTokensBody) -> dict[str, Any] | None:
    given = (body.output_config and body.output_config.format) or body.output_format
    if given is None:
        return None
    return {"type": "json_schema", "json_schema": {"name": "output", "schema": given.schema_, "strict": True}}


def _check_goes_on(turn: Turn, place: str) -> None:
    """The model can only go on with a text."""
    blocks = read_blocks(turn.content, "assistant", place)
    if any(isinstance(block, ToolUseBlock) for block in blocks):
        raise RequestError(f"{place} calls tools: it must be followed by a user message with their results.", place)
    if not _text(blocks):
        raise RequestError(f"{place} has no text that could be continued.", place)


def _check_budget(body: MessagesBody) -> None:
    budget = body.thinking.budget_tokens if body.thinking else None
    if budget is not None and budget >= body.max_tokens:
        raise RequestError(
            f"thinking.budget_tokens must be below max_tokens = {body.max_tokens}, got {budget}.",
            "thinking.budget_tokens",
        )

"""The bodies of Anthropic's Messages API: fields, content blocks, their types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator

from octavo.cluster.ingress.protocol import NOT_YET, WITHOUT_EFFECT
from octavo.cluster.ingress.vendors import VendorBody, objects

_NOTHING: tuple[Any, ...] = (None, False, "", [], {})


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())


class TextBlock(_Part):
    type: Literal["text"]
    text: str


class ThinkingBlock(_Part):
    """What the model thought. `signature` is taken as it comes: thoughts are not signed here."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class RedactedThinkingBlock(_Part):
    """Thoughts that nobody here can read: they are left out."""

    type: Literal["redacted_thinking"]


class ToolUseBlock(_Part):
    """The model's call of a tool."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


def _content(value: Any) -> str | list[dict[str, Any]]:
    if isinstance(value, str):
        return value
    try:
        return objects(value)
    except ValueError:
        raise ValueError("must be a string or a list of blocks") from None


class ToolResultBlock(_Part):
    """What the tool gave; an error is told to the model as one."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: Annotated[
        str | list[dict[str, Any]], PlainValidator(_content, json_schema_input_type=str | list[TextBlock])
    ] = ""
    is_error: bool | None = None


Block = TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock
# Which blocks a message of each role may have, and what each is.
BLOCKS: Mapping[str, Mapping[str, type[Block]]] = {
    "user": {"text": TextBlock, "tool_result": ToolResultBlock},
    "assistant": {
        "text": TextBlock,
        "thinking": ThinkingBlock,
        "redacted_thinking": RedactedThinkingBlock,
        "tool_use": ToolUseBlock,
    },
    "system": {"text": TextBlock},
}
Texts = Annotated[str | list[dict[str, Any]], PlainValidator(_content, json_schema_input_type=str | list[TextBlock])]


class Turn(_Part):
    role: Literal["user", "assistant", "system"]
    content: Annotated[str | list[dict[str, Any]], PlainValidator(_content, json_schema_input_type=str | list[Block])]


class Tool(_Part):
    """A tool that the client runs. `type` is only given for the vendor's own tools, or as custom."""

    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


Tools = Annotated[list[dict[str, Any]], PlainValidator(objects, json_schema_input_type=list[Tool])]


class ToolChoice(_Part):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(_Part):
    """Whether the model thinks before it answers; how much, it decides itself."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Annotated[int, Field(ge=1)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(_Part):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(_Part):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountTokensBody(VendorBody):
    """What the input's tokens follow from."""

    not_yet: ClassVar[Mapping[str, tuple[str, tuple[Any, ...]]]] = {
        **NOT_YET,
        "container": ("Running code", _NOTHING),
        "mcp_servers": ("Calling MCP servers for the client", _NOTHING),
        "thread": ("A conversation held by the server", _NOTHING),
    }
    without_effect: ClassVar[frozenset[str]] = WITHOUT_EFFECT | {
        "betas",
        "cache_control",
        "diagnostics",
        "inference_geo",
        "speed",
    }

    messages: list[Turn]
    system: Texts | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None


class MessagesBody(CountTokensBody):
    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: list[str] | None = None

    @property
    def shows_thinking(self) -> bool:
        return self.thinking is None or self.thinking.display != "omitted"

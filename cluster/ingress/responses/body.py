"""The bodies of OpenAI's Responses API: fields, items, their types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator

from octavo.cluster.ingress.protocol import NOT_YET, WITHOUT_EFFECT, Content
from octavo.cluster.ingress.vendors import VendorBody, objects

_NOTHING: tuple[Any, ...] = (None, False, "", [], {})
MAX_METADATA = 16


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())


class _Item(_Part):
    id: str | None = None


class MessageItem(_Item):
    """Something said. An assistant's message is the model's own."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content


class FunctionCallItem(_Item):
    """The model's call of a function. `arguments`: JSON text."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class FunctionCallOutputItem(_Item):
    """What the function gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: Content


class ReasoningText(_Part):
    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(_Item):
    """What the model thought: in `content`, or in `summary` where that was asked for."""

    type: Literal["reasoning"]
    summary: list[ReasoningText] = []
    content: list[ReasoningText] | None = None

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content or self.summary)


class ItemReference(_Part):
    """An item of a stored response."""

    type: Literal["item_reference"] = "item_reference"
    id: str


Item = MessageItem | FunctionCallItem | FunctionCallOutputItem | ReasoningItem | ItemReference
ITEMS: Mapping[str, type[Item]] = {
    "message": MessageItem,
    "function_call": FunctionCallItem,
    "function_call_output": FunctionCallOutputItem,
    "reasoning": ReasoningItem,
    "item_reference": ItemReference,
}


class FunctionTool(_Part):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(_Part):
    type: Literal["function"]
    name: str


class TextConfig(_Part):
    format: dict[str, Any] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningConfig(_Part):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None

    @property
    def shows_summary(self) -> bool:
        return bool(self.summary or self.generate_summary)


def _input(value: Any) -> str | list[dict[str, Any]]:
    if isinstance(value, str):
        return value
    try:
        return objects(value)
    except ValueError:
        raise ValueError("must be a string or a list of items") from None


Input = Annotated[str | list[dict[str, Any]], PlainValidator(_input, json_schema_input_type=str | list[Item])]
Tools = Annotated[list[dict[str, Any]], PlainValidator(objects, json_schema_input_type=list[FunctionTool])]
Include = Literal[
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
    "reasoning.encrypted_content",
    "message.output_text.logprobs",
]


class InputBody(VendorBody):
    """What the input's tokens follow from. `input`: a user's text, or items."""

    not_yet: ClassVar[Mapping[str, tuple[str, tuple[Any, ...]]]] = {
        **NOT_YET,
        "background": ("Answering in the background", _NOTHING),
        "conversation": ("A stored conversation", _NOTHING),
        "prompt": ("A stored prompt", _NOTHING),
        "moderation": ("Moderation", _NOTHING),
    }
    without_effect: ClassVar[frozenset[str]] = WITHOUT_EFFECT | {
        "max_tool_calls",
        "prompt_cache_options",
        "stream_options",
    }

    input: Input | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    truncation: Literal["auto", "disabled"] | None = None


class ResponsesBody(InputBody):
    include: list[Include] | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=MAX_METADATA)] | None = None
    user: str | None = None
    store: bool | None = None

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.top_logprobs) or "message.output_text.logprobs" in (self.include or ())

    @property
    def is_stored(self) -> bool:
        return self.store is not False

    @property
    def shows_summary(self) -> bool:
        return self.reasoning is not None and self.reasoning.shows_summary


class Page(BaseModel):
    """The query of a list. Values come as text."""

    after: str | None = None
    limit: Annotated[int, Field(ge=1, le=100)] = 20
    order: Literal["asc", "desc"] = "desc"

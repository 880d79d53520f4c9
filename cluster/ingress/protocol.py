"""The bodies of requests: OpenAI's fields and vLLM's additions, their types, and what of them is not supported yet.

Types are strict (no number in quotes); null means "not given". Ranges of sampling values are the business of
`SamplingParams`, and what needs the model (context length, vocabulary) is checked by whoever has it. A field that asks
for something octavo cannot do yet is refused, by name; a field nobody knows is accepted and reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainValidator, PrivateAttr, ValidationError

from octavo.cluster.ingress.tools import ToolFields
from octavo.engine.errors import RequestError

_NOTHING: tuple[Any, ...] = (None, False, "", [], {})
# Field → what it asks for, and the values that ask for nothing.
NOT_YET: Mapping[str, tuple[str, tuple[Any, ...]]] = {
    "reasoning": ("Reasoning", _NOTHING),
    "thinking_token_budget": ("Reasoning", _NOTHING),
    "modalities": ("Output other than text", (*_NOTHING, ["text"])),
    "audio": ("Output other than text", _NOTHING),
    "media_io_kwargs": ("Input other than text", _NOTHING),
    "mm_processor_kwargs": ("Input other than text", _NOTHING),
    "prompt_embeds": ("Input other than text", _NOTHING),
    "web_search_options": ("Web search", _NOTHING),
    "prediction": ("Predicted output", _NOTHING),
    "kv_transfer_params": ("KV transfer by request", _NOTHING),
    "ec_transfer_params": ("KV transfer by request", _NOTHING),
    "vllm_xargs": ("Extra engine arguments", _NOTHING),
    "logits_processors": ("Logits processors by request", _NOTHING),
    "prompt_logprob_token_ids": ("Logprobs of chosen tokens", _NOTHING),
    "repetition_detection": ("Repetition detection", _NOTHING),
    "watermarking": ("Watermarking", _NOTHING),
    "return_weight_versions": ("Returning weight versions", _NOTHING),
    "routed_experts_prompt_start": ("Returning routed experts", _NOTHING),
    "return_routed_experts": ("Returning routed experts", _NOTHING),
}
# Fields that are for the provider's books, or for paths of vLLM that only render prompts.
WITHOUT_EFFECT = frozenset(
    {
        "guided_decoding_backend",
        "metadata",
        "prompt_cache_key",
        "prompt_cache_retention",
        "return_mm_kwargs",
        "return_token_offsets",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
# Types of content parts that are text, and where they have it.
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


def _one_as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    """`prompt` in any of its four forms, as a tuple of texts and token id sequences."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise ValueError("must be a string, a list of strings, a list of token ids or a list of such lists")
    if not value:
        raise ValueError("must not be empty")
    if _is_ids(value):
        return (tuple(value),)
    if not all(isinstance(item, str) for item in value) and not all(_is_ids(item) for item in value):
        raise ValueError("must be a string, a list of strings, a list of token ids or a list of such lists")
    return tuple(item if isinstance(item, str) else tuple(item) for item in value)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)


def _content(value: Any) -> str | list[Any] | None:
    """A message's content: a text, or parts that are text."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of parts")
    for part in value:
        if isinstance(part, str):
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            raise ValueError("must be a string or a list of parts, each with a type")
        if kind not in TEXT_PARTS:
            raise ValueError(f"has a part of type {kind!r}, which is not supported yet: only text is")
        if not isinstance(part.get(TEXT_PARTS[kind]), str):
            raise ValueError(f"has a part of type {kind!r} without a string {TEXT_PARTS[kind]!r}")
    return value


def _early_stopping(value: Any) -> Any:
    if value is not None and not isinstance(value, bool) and value != "never":
        raise ValueError('must be true, false or "never"')
    return value


Prompts = Annotated[
    tuple[str | tuple[int, ...], ...],
    PlainValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]
Content = Annotated[
    str | list[Any] | None, PlainValidator(_content, json_schema_input_type=str | list[dict[str, Any]] | None)
]
EarlyStopping = Annotated[
    bool | Literal["never"] | None,
    PlainValidator(_early_stopping, json_schema_input_type=bool | Literal["never"] | None),
]
ReasoningEffort: TypeAlias = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None
Texts = Annotated[list[str] | None, BeforeValidator(_one_as_list, json_schema_input_type=str | list[str] | None)]


class Body(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())
    not_yet: ClassVar[Mapping[str, tuple[str, tuple[Any, ...]]]] = NOT_YET
    without_effect: ClassVar[frozenset[str]] = WITHOUT_EFFECT

    model: str | None = None

    def unknown_fields(self) -> list[str]:
        """Names of fields that no code reads. Raises RequestError for those that ask for what octavo cannot do yet."""
        unknown = []
        for name, value in (self.model_extra or {}).items():
            if name in self.not_yet:
                feature, neutral = self.not_yet[name]
                if value not in neutral:
                    raise RequestError(f"{feature} is not supported yet: {name} must be left out.", name)
            elif name not in self.without_effect:
                unknown.append(name)
        return unknown


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


@dataclass(frozen=True, slots=True)
class Beyond:
    """What a request may ask for that OpenAI's completions have no field for, but gRPC and other vendors' bodies have.

    fill_context: max_tokens is what the context has room for. within_context: it is at most that. The others: see
    SamplingParams.
    """

    fill_context: bool = False
    detokenize: bool = True
    skip_reading_prefix_cache: bool | None = None
    within_context: bool = False


class DrawnBody(Body):
    """What every request that draws tokens may say, whichever vendor's API it comes by."""

    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: Texts = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    skip_special_tokens: bool | None = None
    logit_bias: dict[str, float] | None = None
    bad_words: list[str] | None = None
    structured_outputs: dict[str, Any] | None = None
    priority: int | None = None
    cache_salt: str | None = None


class GenerationBody(DrawnBody):
    """What completions and chat completions have in common."""

    _beyond: Beyond = PrivateAttr(default=Beyond())

    stream_options: StreamOptions | None = None
    n: int | None = None
    include_stop_str_in_output: bool | None = None
    max_tokens: int | None = None
    prompt_logprobs: int | None = None
    spaces_between_special_tokens: bool | None = None
    allowed_token_ids: list[int] | None = None
    logprob_token_ids: list[int] | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] | None = None
    add_special_tokens: bool | None = None
    echo: bool | None = None
    request_id: str | None = None
    session_id: str | None = None
    use_beam_search: bool | None = None
    beam_width: int | None = None
    length_penalty: float | None = None
    early_stopping: EarlyStopping = None
    stream_interval: int | None = None
    return_prompt_text: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    response_format: dict[str, Any] | None = None
    structural_tag: str | dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_json_object: bool | None = None
    guided_whitespace_pattern: str | None = None

    @property
    def beyond(self) -> Beyond:
        return self._beyond

    @beyond.setter
    def beyond(self, value: Beyond) -> None:
        self._beyond = value


class CompletionBody(GenerationBody):
    prompt: Prompts
    logprobs: int | None = None
    best_of: int | None = None
    suffix: str | None = None


def text_of(content: str | list[Any] | None) -> str:
    """A message's content as one text."""
    if not isinstance(content, list):
        return content or ""
    return "\n".join(part if isinstance(part, str) else part[TEXT_PARTS[part["type"]]] for part in content)


class Message(BaseModel):
    """One turn. Further fields go to the chat template as they are."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content = None

    @property
    def text(self) -> str:
        """The content as one text."""
        return text_of(self.content)


class TemplateFields(Body, ToolFields):
    """How messages become a prompt."""

    messages: list[Message]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: ReasoningEffort = None


class ChatBody(GenerationBody, TemplateFields):
    include_reasoning: bool | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class TokenizeBody(Body, ToolFields):
    """A text (`prompt`) or a conversation (`messages`), never both."""

    prompt: str | None = None
    messages: list[Message] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: ReasoningEffort = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    tokens: list[int]


AnyBody = TypeVar("AnyBody", bound=Body)
AnyModel = TypeVar("AnyModel", bound=BaseModel)


def parse(kind: type[AnyBody], data: bytes) -> AnyBody:
    """The body in `data` (JSON). Raises RequestError naming the first field that is wrong."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise _refusal(error) from None


def body_of(kind: type[AnyModel], values: Mapping[str, Any], place: str = "") -> AnyModel:
    """The same of values that came otherwise. `place`: put before the name of a field that is wrong."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        refusal = _refusal(error)
        param = f"{place}.{refusal.param}" if place else refusal.param
        raise RequestError(f"{place}.{refusal.message}" if place else refusal.message, param) from None


def _refusal(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return RequestError(f"The body is not valid JSON: {first.get('ctx', {}).get('error', 'syntax error')}.")
    param = ""
    for part in first["loc"]:
        param += f"[{part}]" if isinstance(part, int) else f".{part}" if param else part
    if not param:
        return RequestError("The body must be a JSON object.")
    if first["type"] == "missing":
        return RequestError(f"{param} is required.", param)
    if first["type"] == "value_error":
        return RequestError(f"{param} {first['ctx']['error']}.", param)
    return RequestError(f"{param}: {first['msg']}.", param)

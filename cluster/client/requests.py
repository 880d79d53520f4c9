"""From the client's arguments to inference.proto's requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from octavo.cluster.wire import beams_to_proto, structured_to_proto
from octavo.engine.beam import Beams
from octavo.engine.errors import RequestError
from octavo.engine.grammar.spec import StructuredOutputs
from octavo.protos.octavo.v1 import inference_pb2 as pb
from octavo.protos.octavo.v1 import sampling_pb2

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]


class Params(TypedDict, total=False):
    """What may be said of an answer. What is left out is the model's own default; see GenerationRequest and
    SamplingParams in protos/octavo/v1. `structured_outputs`: the fields of StructuredOutputs, a schema as JSON text or
    as a mapping. `beams`: those of octavo.engine.beam.Beams. `stop` may be one string. `max_tokens` 0: what the context
    has room for.
    """

    n: int
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    max_tokens: int
    min_tokens: int
    logprobs: int
    prompt_logprobs: int
    skip_special_tokens: bool
    spaces_between_special_tokens: bool
    include_stop_str_in_output: bool
    logit_bias: Mapping[int, float]
    allowed_token_ids: Sequence[int]
    bad_words: Sequence[str]
    skip_reading_prefix_cache: bool
    structured_outputs: Mapping[str, Any]
    beams: Mapping[str, Any]
    logprob_token_ids: Sequence[int]
    model: str
    priority: int
    cache_salt: str
    request_id: str
    session_id: str
    return_text: bool
    return_token_ids: bool
    return_prompt_token_ids: bool
    add_special_tokens: bool
    truncate_prompt_tokens: int
    add_generation_prompt: bool
    continue_final_message: bool
    chat_template: str
    chat_template_kwargs: Mapping[str, Any]


_OF_CONVERSATION = ("add_generation_prompt", "continue_final_message", "chat_template", "chat_template_kwargs")
_OF_PARAMS = tuple(field.name for field in sampling_pb2.SamplingParams.DESCRIPTOR.fields)
_OF_REQUEST = tuple(name for name in Params.__annotations__ if name not in (*_OF_CONVERSATION, *_OF_PARAMS))


def generation_request(prompt: Prompt, params: Params) -> Any:
    """Raises RequestError for what no request can say: a name that does not exist, a value of a wrong type."""
    given: dict[str, Any] = {name: value for name, value in params.items() if value is not None}
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    for name in given:
        if name not in Params.__annotations__:
            raise RequestError(f"There is no parameter {name!r}.", name)
    request = pb.GenerationRequest()
    _set(request, given, _OF_REQUEST)
    _set(request.params, given, _OF_PARAMS)
    _set_prompt(request, prompt, given)
    return request


def tokenize_request(
    prompt: str | Sequence[Mapping[str, str]], model: str | None, add_special_tokens: bool | None, texts: bool
) -> Any:
    request = pb.TokenizeRequest(model=model, add_special_tokens=add_special_tokens, return_token_texts=texts)
    _set_prompt(request, prompt, {})
    return request


def _set_prompt(request: Any, prompt: Prompt, given: Mapping[str, Any]) -> None:
    if isinstance(prompt, str):
        request.text = prompt
    elif prompt and isinstance(prompt[0], Mapping):
        request.chat.SetInParent()
        try:
            request.chat.messages.extend(pb.ChatMessage(**message) for message in prompt)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise RequestError(f"messages: {error}.", "messages") from None
        _set(request.chat, given, _OF_CONVERSATION)
    else:
        request.token_ids.SetInParent()
        try:
            request.token_ids.ids.extend(prompt)
        except (TypeError, ValueError) as error:
            raise RequestError(f"prompt: {error}.", "prompt") from None


def _set(message: Any, given: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in names:
        if name not in given:
            continue
        value, field = given[name], message.DESCRIPTOR.fields_by_name[name]
        try:
            if name == "structured_outputs":
                message.structured_outputs.CopyFrom(structured_to_proto(StructuredOutputs(**value)))
            elif name == "beams":
                message.beams.CopyFrom(beams_to_proto(Beams(**value)))
            elif name == "logit_bias" or name == "chat_template_kwargs":
                getattr(message, name).update(value)
            elif field.is_repeated:
                getattr(message, name).extend(value)
            else:
                setattr(message, name, value)
        except (TypeError, ValueError) as error:
            raise RequestError(f"{name}: {error}.", name) from None

"""From gRPC's requests to the bodies that a Service takes. The only place that knows both."""

from __future__ import annotations

from typing import Any

from google.protobuf.json_format import MessageToDict

from octavo.cluster.ingress.protocol import Beyond, ChatBody, CompletionBody, Message, TokenizeBody, body_of
from octavo.cluster.ingress.structured import FORM_FIELDS
from octavo.cluster.wire import beams_from_proto, structured_from_proto
from octavo.engine.errors import RequestError
from octavo.protos.octavo.v1 import inference_pb2

# Fields with the same name and meaning on both sides, absent or not.
_OF_REQUEST = ("cache_salt", "request_id", "add_special_tokens", "truncate_prompt_tokens")
_OF_PARAMS = (
    *("n", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "top_k", "min_p"),
    *("seed", "ignore_eos", "min_tokens", "prompt_logprobs", "skip_special_tokens", "spaces_between_special_tokens"),
    "include_stop_str_in_output",
)
_LISTS = ("stop", "stop_token_ids", "allowed_token_ids", "bad_words", "logprob_token_ids")
_OF_CONVERSATION = ("add_generation_prompt", "continue_final_message", "chat_template")
_RIGHT = inference_pb2.GenerationRequest.TRUNCATION_SIDE_RIGHT


def generation_body(request: Any) -> CompletionBody | ChatBody:
    """The body that a GenerationRequest stands for. Raises RequestError."""
    params = request.params
    values: dict[str, Any] = {
        "model": request.model or None,
        "priority": request.priority,
        "truncation_side": "right" if request.truncation_side == _RIGHT else None,
        "logit_bias": {str(token): bias for token, bias in params.logit_bias.items()} or None,
        **_given(request, _OF_REQUEST),
        **_given(params, _OF_PARAMS),
        **{name: list(getattr(params, name)) for name in _LISTS if getattr(params, name)},
    }
    if params.HasField("beams"):
        beams = beams_from_proto(params.beams)
        values |= {"use_beam_search": True, "beam_width": beams.width}
        values |= {"length_penalty": beams.length_penalty, "early_stopping": beams.early_stopping}
    if params.HasField("structured_outputs"):
        form = structured_from_proto(params.structured_outputs)
        given = {name: getattr(form, name) for name in FORM_FIELDS}
        values["structured_outputs"] = {name: value for name, value in given.items() if value not in (None, False, ())}
    fill_context = params.HasField("max_tokens") and params.max_tokens == 0
    if not fill_context:
        values |= _given(params, ("max_tokens",))
    body: CompletionBody | ChatBody
    kind = request.WhichOneof("prompt")
    if kind == "chat":
        if params.HasField("logprobs"):
            if params.logprobs < 0:
                raise RequestError(f"logprobs must not be negative, got {params.logprobs}.", "logprobs")
            values |= {"logprobs": True, "top_logprobs": params.logprobs}
        body = body_of(ChatBody, {**values, **_conversation(request.chat)})
    elif kind is not None:
        values |= _given(params, ("logprobs",))
        values["prompt"] = request.text if kind == "text" else list(request.token_ids.ids)
        body = body_of(CompletionBody, values)
    else:
        raise RequestError("One of text, token_ids and chat must be given.", "prompt")
    skip = params.skip_reading_prefix_cache if params.HasField("skip_reading_prefix_cache") else None
    body.beyond = Beyond(fill_context, has_text(request), skip)
    return body


def has_text(request: Any) -> bool:
    """Whether the answer to a GenerationRequest shows text."""
    asked = not request.HasField("return_text") or request.return_text
    return bool(asked and (not request.params.HasField("detokenize") or request.params.detokenize))


def tokenize_body(request: Any) -> TokenizeBody:
    """The body that a TokenizeRequest stands for. Raises RequestError."""
    values: dict[str, Any] = {"model": request.model or None, "return_token_strs": request.return_token_texts}
    values |= _given(request, ("add_special_tokens",))
    kind = request.WhichOneof("prompt")
    if kind is None:
        raise RequestError("One of text and chat must be given.", "prompt")
    values |= _conversation(request.chat) if kind == "chat" else {"prompt": request.text}
    return body_of(TokenizeBody, values)


def _conversation(chat: Any) -> dict[str, Any]:
    values = _given(chat, _OF_CONVERSATION)
    if chat.HasField("chat_template_kwargs"):
        values["chat_template_kwargs"] = _plain(MessageToDict(chat.chat_template_kwargs))
    values["messages"] = [
        body_of(
            Message,
            {"role": message.role, "content": message.content, **_given(message, ("name",))},
            f"messages[{number}]",
        )
        for number, message in enumerate(chat.messages)
    ]
    return values


def _plain(value: Any) -> Any:
    """A Struct has no integers: whole numbers were meant as such."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _given(proto: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(proto, name) for name in names if proto.HasField(name)}

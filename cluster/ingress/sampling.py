"""From a request body to SamplingParams: names, defaults, and what the context has room for."""

from __future__ import annotations

import secrets
from typing import TypeVar

from octavo.cluster.ingress.protocol import ChatBody, CompletionBody, GenerationBody
from octavo.engine.beam import Beams
from octavo.engine.errors import RequestError
from octavo.engine.grammar.spec import StructuredOutputs
from octavo.engine.params import MAX_LOGPROBS, SamplingParams
from octavo.engine.types import GenerationDefaults

DEFAULT_COMPLETION_TOKENS = 16
T = TypeVar("T")


def sampling_params(
    body: GenerationBody,
    defaults: GenerationDefaults,
    prompt_tokens: int,
    context: int,
    structured: StructuredOutputs | None = None,
) -> SamplingParams:
    """How to sample for a prompt of `prompt_tokens` tokens in a context of `context` tokens.

    The seed is drawn if none is given. Raises RequestError for a value out of range.
    """
    logprobs = _logprobs(body)
    prompt_logprobs = body.prompt_logprobs
    if isinstance(body, CompletionBody) and body.echo and logprobs is not None and prompt_logprobs is None:
        prompt_logprobs = logprobs
    _check_top("prompt_logprobs", prompt_logprobs)
    if body.prompt_logprobs is not None and body.stream:
        raise RequestError("prompt_logprobs cannot be streamed.", "prompt_logprobs")
    beams = None if only_scores(body) else beams_of(body)
    if beams is not None:  # the model's authors recommend how to draw, and nothing is drawn
        defaults = GenerationDefaults(max_tokens=defaults.max_tokens)
    params = SamplingParams(
        n=_or(body.n, 1),
        beams=beams,
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        repetition_penalty=_or(body.repetition_penalty, _or(defaults.repetition_penalty, 1.0)),
        temperature=_or(body.temperature, _or(defaults.temperature, 1.0)),
        top_p=_or(body.top_p, _or(defaults.top_p, 1.0)),
        top_k=_or(body.top_k, _or(defaults.top_k, 0)),
        min_p=_or(body.min_p, _or(defaults.min_p, 0.0)),
        seed=body.seed,
        stop=tuple(body.stop or ()),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        max_tokens=_max_tokens(body, defaults, prompt_tokens, context),
        min_tokens=_or(body.min_tokens, 0),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        detokenize=body.beyond.detokenize,
        skip_special_tokens=_or(body.skip_special_tokens, True),
        spaces_between_special_tokens=_or(body.spaces_between_special_tokens, True),
        include_stop_str_in_output=bool(body.include_stop_str_in_output),
        logit_bias={} if not body.logit_bias else body.logit_bias,  # type: ignore[arg-type]  # keys become ints there
        allowed_token_ids=_allowed(body.allowed_token_ids),
        logprob_token_ids=tuple(body.logprob_token_ids or ()),
        bad_words=tuple(body.bad_words or ()),
        skip_reading_prefix_cache=body.beyond.skip_reading_prefix_cache,
        structured_outputs=structured,
    )
    return params if params.seed is not None else params.replace(seed=secrets.randbits(63))


def beams_of(body: GenerationBody) -> Beams | None:
    """How to search, if the body asks for it: for the n best of beam_width beams (best_of in completions), which are n
    if not given. Raises RequestError."""
    if not body.use_beam_search:
        return None
    if body.stream:
        raise RequestError("Beam search cannot be streamed: all of its answer comes at the end.", "stream")
    width = body.beam_width
    if width is None and isinstance(body, CompletionBody):
        width = body.best_of
    return Beams(_or(width, _or(body.n, 1)), _or(body.length_penalty, 1.0), _or(body.early_stopping, False))


def num_sequences(body: GenerationBody) -> int:
    """How many are computed side by side for each prompt."""
    beams = beams_of(body)
    return _or(body.n, 1) if beams is None else beams.width


def only_scores(body: GenerationBody) -> bool:
    """Whether the client wants its prompt back (echo with max_tokens 0) and nothing generated."""
    return isinstance(body, CompletionBody) and bool(body.echo) and body.max_tokens == 0


def _max_tokens(body: GenerationBody, defaults: GenerationDefaults, prompt_tokens: int, context: int) -> int:
    room = context - prompt_tokens
    name, asked = "max_tokens", body.max_tokens
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
        name, asked = "max_completion_tokens", body.max_completion_tokens
    if body.beyond.fill_context:
        return room
    if asked is None:
        default = DEFAULT_COMPLETION_TOKENS if isinstance(body, CompletionBody) else _or(defaults.max_tokens, room)
        return max(min(room, default), min(room, _or(body.min_tokens, 0)))
    if only_scores(body):
        return 1  # the engine draws at least one; it is dropped
    if asked < 1:
        raise RequestError(f"{name} must be an integer of at least 1, got {asked}.", name)
    if asked > room:
        if body.beyond.within_context:
            return room
        raise RequestError(
            f"The context is {context} tokens long, but {prompt_tokens + asked} were asked for: {prompt_tokens} of the "
            f"prompt and {name} = {asked}.",
            name,
        )
    return asked


def _logprobs(body: GenerationBody) -> int | None:
    """The number of top candidates per token, or None for no logprobs at all."""
    if isinstance(body, ChatBody):
        if body.top_logprobs is not None:
            if not body.logprobs:
                raise RequestError("top_logprobs needs logprobs to be true.", "top_logprobs")
            _check_top("top_logprobs", body.top_logprobs)
        return _or(body.top_logprobs, 0) if body.logprobs else None
    assert isinstance(body, CompletionBody), type(body)
    _check_top("logprobs", body.logprobs)
    return body.logprobs


def _check_top(name: str, value: int | None) -> None:
    if value is not None and not 0 <= value <= MAX_LOGPROBS:
        raise RequestError(f"{name} must be an integer between 0 and {MAX_LOGPROBS}, got {value}.", name)


def _allowed(ids: list[int] | None) -> tuple[int, ...]:
    if ids is not None and not ids:
        raise RequestError("allowed_token_ids must not be empty: nothing could be drawn.", "allowed_token_ids")
    return tuple(ids or ())


def _or(value: T | None, default: T) -> T:
    return default if value is None else value

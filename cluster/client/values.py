"""What the client returns: frozen values made of inference.proto's messages. Text is "" and tuples are empty where
nothing was asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from octavo.protos.octavo.v1 import inference_pb2 as pb

Reason = Literal["stop", "length"]
_REASONS: dict[int, Reason | None] = {
    pb.Output.FINISH_REASON_UNSPECIFIED: None,
    pb.Output.FINISH_REASON_STOP: "stop",
    pb.Output.FINISH_REASON_LENGTH: "length",
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token at a position. rank: 1 = likeliest. text: of the token alone."""

    token_id: int
    logprob: float
    rank: int
    text: str


@dataclass(frozen=True, slots=True)
class Logprobs:
    """One position: the token that stands there, and the likeliest ones in descending order."""

    token: Candidate
    top: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class Prompt:
    """The prompt as the model got it. logprobs: one per token, the first None."""

    token_ids: tuple[int, ...]
    logprobs: tuple[Logprobs | None, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens. cached_tokens: of the prompt, found in the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Output:
    """One of the n sequences. finish_reason: None while it goes on. stop_reason: the stop string or stop token's id
    that ended it, if one did.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprobs, ...]
    finish_reason: Reason | None
    stop_reason: int | str | None


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer: what is new of one or more sequences. usage: in the last chunk. prompt: in the first, if
    asked for.
    """

    outputs: tuple[Output, ...]
    prompt: Prompt | None
    usage: Usage | None

    @property
    def text(self) -> str:
        """Of the first output; all there is to it with n = 1."""
        return self.outputs[0].text if self.outputs else ""


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole answer. `outputs[i]` is sequence i."""

    id: str
    model: str
    outputs: tuple[Output, ...]
    prompt: Prompt | None
    usage: Usage

    @property
    def text(self) -> str:
        """Of the first sequence."""
        return self.outputs[0].text


@dataclass(frozen=True, slots=True)
class Tokens:
    """texts: one per token, if asked for. max_model_len: the model's context."""

    token_ids: tuple[int, ...]
    texts: tuple[str, ...]
    max_model_len: int


@dataclass(frozen=True, slots=True)
class Model:
    """root: where the model comes from. created: Unix seconds."""

    name: str
    root: str
    max_model_len: int
    created: int


def chunk(proto: Any) -> Chunk:
    usage = _usage(proto.usage) if proto.HasField("usage") else None
    return Chunk(_outputs(proto.outputs), _prompt(proto), usage)


def generation(proto: Any) -> Generation:
    return Generation(proto.id, proto.model, _outputs(proto.outputs), _prompt(proto), _usage(proto.usage))


def tokens(proto: Any) -> Tokens:
    return Tokens(tuple(proto.token_ids), tuple(proto.token_texts), proto.max_model_len)


def models(proto: Any) -> list[Model]:
    return [Model(entry.name, entry.root, entry.max_model_len, entry.created) for entry in proto.models]


def _outputs(protos: Iterable[Any]) -> tuple[Output, ...]:
    return tuple(
        Output(
            index=proto.index,
            text=proto.text,
            token_ids=tuple(proto.token_ids),
            logprobs=tuple(map(_logprobs, proto.logprobs)),
            finish_reason=_REASONS[proto.finish_reason],
            stop_reason=None if (kind := proto.WhichOneof("stop_reason")) is None else getattr(proto, kind),
        )
        for proto in protos
    )


def _prompt(proto: Any) -> Prompt | None:
    if not proto.HasField("prompt"):
        return None
    entries = (_logprobs(entry) if entry.HasField("token") else None for entry in proto.prompt.logprobs)
    return Prompt(tuple(proto.prompt.token_ids), tuple(entries))


def _logprobs(proto: Any) -> Logprobs:
    return Logprobs(_candidate(proto.token), tuple(map(_candidate, proto.top)))


def _candidate(proto: Any) -> Candidate:
    return Candidate(proto.token_id, proto.logprob, proto.rank, proto.text)


def _usage(proto: Any) -> Usage:
    return Usage(proto.prompt_tokens, proto.completion_tokens, proto.cached_tokens)

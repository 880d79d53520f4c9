"""Dataclass ↔ protobuf: the only place that knows both. Pure functions; no gRPC, no Ray.

`x_to_proto` and `x_from_proto` are inverse to each other but for what the .proto files say is not sent.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from octavo.cluster.ingress.client import HandedOver, ReplicaLost
from octavo.engine.beam import Beams
from octavo.engine.core.blocks import BlockChanges
from octavo.engine.core.prefix import NAME_BYTES
from octavo.engine.errors import CapacityError, NotFoundError, OctavoError, RequestError
from octavo.engine.grammar.spec import StructuredOutputs
from octavo.engine.params import SamplingParams
from octavo.engine.pooling.info import PoolingInfo
from octavo.engine.pooling.params import PoolingParams
from octavo.engine.types import (
    EngineInfo,
    EngineStats,
    FinishReason,
    GenerationDefaults,
    PhaseTimes,
    RankStatus,
    Request,
    Resumed,
    TokenDelta,
    TokenLogprobs,
)
from octavo.protos.octavo.v1 import sampling_pb2, tokens_pb2

# Fields that are plain scalars on both sides, with the same meaning of absence (= the dataclass's default).
_SCALARS = (
    *(
        "n",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
    ),
    *("ignore_eos", "min_tokens", "logprobs", "prompt_logprobs", "detokenize", "skip_special_tokens"),
    *("spaces_between_special_tokens", "include_stop_str_in_output", "skip_reading_prefix_cache"),
)
_LISTS = ("stop", "stop_token_ids", "allowed_token_ids", "bad_words", "logprob_token_ids")
_STRUCTURED = tuple(field.name for field in dataclasses.fields(StructuredOutputs))
_STRUCTURED_TEXTS = ("json", "regex", "grammar", "structural_tag", "whitespace_pattern")
_DEFAULTS = SamplingParams()
_EARLY_STOPPING: tuple[Any, ...] = (False, True, "never")  # by the enum's numbers
_UNLIMITED = 0  # max_tokens None on the wire, where absent means the default

_REASONS: tuple[FinishReason | None, ...] = (None, "stop", "length", "abort", "error")  # by the enum's numbers
_REASON_NUMBERS: dict[FinishReason | None, Any] = {reason: number for number, reason in enumerate(_REASONS)}


@dataclass(frozen=True, slots=True)
class IngressAddress:
    """Where a replica dials back: `address` is host:port, `token` the ingress's secret."""

    id: str
    address: str
    token: str


@dataclass(frozen=True, slots=True)
class Submission:
    """The argument of the control call: a request, where its tokens go, and the ingress's number for it."""

    request: Request
    ingress: IngressAddress
    stream_id: int


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """What a replica says of itself. clock: its monotonic clock then, in seconds, for rates between two of these."""

    info: EngineInfo
    stats: EngineStats
    ranks: tuple[RankStatus, ...]
    clock: float


# --- sampling parameters


def params_to_proto(params: SamplingParams) -> Any:
    """Only what differs from the defaults is set."""
    values: dict[str, Any] = {name: getattr(params, name) for name in _SCALARS}
    changed = {name: value for name, value in values.items() if value != getattr(_DEFAULTS, name)}
    proto = sampling_pb2.SamplingParams(**changed)
    if params.max_tokens != _DEFAULTS.max_tokens:
        proto.max_tokens = _UNLIMITED if params.max_tokens is None else params.max_tokens
    for name in _LISTS:
        getattr(proto, name).extend(getattr(params, name))
    proto.logit_bias.update(params.logit_bias)
    if params.structured_outputs is not None:
        proto.structured_outputs.CopyFrom(structured_to_proto(params.structured_outputs))
    if params.beams is not None:
        proto.beams.CopyFrom(beams_to_proto(params.beams))
    return proto


def params_from_proto(proto: Any) -> SamplingParams:
    """Raises RequestError, naming the field, for a value out of range."""
    values: dict[str, Any] = {name: getattr(proto, name) for name in _SCALARS if proto.HasField(name)}
    if proto.HasField("max_tokens"):
        values["max_tokens"] = None if proto.max_tokens == _UNLIMITED else proto.max_tokens
    for name in _LISTS:
        values[name] = tuple(getattr(proto, name))
    if proto.HasField("beams"):
        values["beams"] = beams_from_proto(proto.beams)
    if proto.HasField("structured_outputs"):
        values["structured_outputs"] = structured_from_proto(proto.structured_outputs)
    return SamplingParams(**values, logit_bias=dict(proto.logit_bias))


def structured_to_proto(spec: StructuredOutputs) -> Any:
    values = {name: getattr(spec, name) for name in _STRUCTURED}
    return sampling_pb2.StructuredOutputs(**{name: value for name, value in values.items() if value is not None})


def structured_from_proto(proto: Any) -> StructuredOutputs:
    """Raises RequestError, naming the field."""
    texts = {name: getattr(proto, name) for name in _STRUCTURED_TEXTS if proto.HasField(name)}
    others = {name: getattr(proto, name) for name in _STRUCTURED if name not in _STRUCTURED_TEXTS}
    values = {**texts, **others, "choice": tuple(proto.choice), "begins_after": tuple(proto.begins_after)}
    return StructuredOutputs(**values)


def beams_to_proto(beams: Beams) -> Any:
    number: Any = _EARLY_STOPPING.index(beams.early_stopping)
    return sampling_pb2.Beams(width=beams.width, length_penalty=beams.length_penalty, early_stopping=number)


def beams_from_proto(proto: Any) -> Beams:
    """Raises RequestError, naming the field, for a value out of range."""
    penalty = proto.length_penalty if proto.HasField("length_penalty") else 1.0
    if not 0 <= proto.early_stopping < len(_EARLY_STOPPING):
        raise RequestError("beams.early_stopping is none of its values.", "early_stopping")
    return Beams(proto.width, penalty, _EARLY_STOPPING[proto.early_stopping])


def pooling_to_proto(params: PoolingParams) -> Any:
    return tokens_pb2.PoolingParams(**{name: getattr(params, name) for name in _POOLING})


def pooling_from_proto(proto: Any) -> PoolingParams:
    """Raises RequestError, naming the field, for a value out of range."""
    return PoolingParams(**{name: getattr(proto, name) for name in _POOLING if proto.HasField(name)})


# --- the control call


def request_to_proto(request: Request) -> Any:
    return tokens_pb2.Request(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        params=params_to_proto(request.params),
        priority=request.priority,
        cache_salt=request.cache_salt,
        bad_words_token_ids=[tokens_pb2.Tokens(ids=ids) for ids in request.bad_words_token_ids],
        resume=[tokens_pb2.Resumed(index=item.index, token_ids=item.token_ids) for item in request.resume],
        pooling=None if request.pooling is None else pooling_to_proto(request.pooling),
        more_prompts=[tokens_pb2.Tokens(ids=ids) for ids in request.more_prompts],
    )


def request_from_proto(proto: Any, arrival_time: float) -> Request:
    """`arrival_time`: when it arrived here, on the engine's clock."""
    return Request(
        request_id=proto.request_id,
        prompt_token_ids=tuple(proto.prompt_token_ids),
        params=params_from_proto(proto.params),
        priority=proto.priority,
        cache_salt=proto.cache_salt if proto.HasField("cache_salt") else None,
        arrival_time=arrival_time,
        bad_words_token_ids=tuple(tuple(tokens.ids) for tokens in proto.bad_words_token_ids),
        resume=tuple(Resumed(item.index, tuple(item.token_ids)) for item in proto.resume),
        pooling=pooling_from_proto(proto.pooling) if proto.HasField("pooling") else None,
        more_prompts=tuple(tuple(tokens.ids) for tokens in proto.more_prompts),
    )


def encode_submission(submission: Submission) -> bytes:
    ingress = submission.ingress
    proto = tokens_pb2.GenerateRequest(
        request=request_to_proto(submission.request),
        ingress=tokens_pb2.Ingress(id=ingress.id, address=ingress.address, token=ingress.token),
        stream_id=submission.stream_id,
    )
    return bytes(proto.SerializeToString())


def decode_submission(data: bytes, arrival_time: float) -> Submission:
    """Raises RequestError for sampling parameters out of range."""
    proto = tokens_pb2.GenerateRequest.FromString(data)
    ingress = IngressAddress(proto.ingress.id, proto.ingress.address, proto.ingress.token)
    return Submission(request_from_proto(proto.request, arrival_time), ingress, proto.stream_id)


def encode_ingress(ingress: IngressAddress) -> bytes:
    """The argument of the control call `subscribe`."""
    return bytes(tokens_pb2.Ingress(id=ingress.id, address=ingress.address, token=ingress.token).SerializeToString())


def decode_ingress(data: bytes) -> IngressAddress:
    proto = tokens_pb2.Ingress.FromString(data)
    return IngressAddress(proto.id, proto.address, proto.token)


def encode_reply(error: OctavoError | None) -> bytes:
    """How a request ended: None = all its sequences did. Any error but the client's and of capacity is ReplicaLost."""
    reply = tokens_pb2.GenerateReply()
    match error:
        case None:
            pass
        case RequestError():
            failure = reply.request
            failure.message, failure.not_found = error.message, isinstance(error, NotFoundError)
            if error.param is not None:
                failure.param = error.param
        case CapacityError():
            reply.capacity.message, reply.capacity.retry_after_s = error.message, error.retry_after_s
        case HandedOver():
            reply.handed_over = str(error)
        case _:
            reply.lost = str(error)
    return bytes(reply.SerializeToString())


def decode_reply(data: bytes) -> OctavoError | None:
    reply = tokens_pb2.GenerateReply.FromString(data)
    match reply.WhichOneof("failure"):
        case None:
            return None
        case "request":
            kind = NotFoundError if reply.request.not_found else RequestError
            return kind(reply.request.message, reply.request.param if reply.request.HasField("param") else None)
        case "capacity":
            return CapacityError(reply.capacity.message, reply.capacity.retry_after_s)
        case "handed_over":
            return HandedOver(reply.handed_over)
        case _:
            return ReplicaLost(reply.lost)


# --- tokens


def logprobs_to_proto(entry: TokenLogprobs) -> Any:
    return tokens_pb2.TokenLogprobs(token_ids=entry.token_ids, logprobs=entry.logprobs, rank=entry.rank)


def logprobs_from_proto(proto: Any) -> TokenLogprobs:
    return TokenLogprobs(tuple(proto.token_ids), tuple(proto.logprobs), proto.rank)


def delta_to_proto(delta: TokenDelta, stream_id: int) -> Any:
    proto = tokens_pb2.TokenDelta(
        stream_id=stream_id,
        index=delta.index,
        token_ids=delta.token_ids,
        finish_reason=_REASON_NUMBERS[delta.finish_reason],
        num_cached_tokens=delta.num_cached_tokens,
        error=delta.error,
        pooled=delta.pooled,
        form_complete=delta.form_complete,
        error_param=delta.error_param,
    )
    if delta.logprobs:
        proto.logprobs.extend(map(logprobs_to_proto, delta.logprobs))
    if isinstance(delta.stop_reason, int):
        proto.stop_token_id = delta.stop_reason
    elif delta.stop_reason is not None:
        proto.stop_string = delta.stop_reason
    if delta.prompt_logprobs is not None:
        proto.prompt_logprobs.SetInParent()
        unknown = tokens_pb2.TokenLogprobs()
        entries = (unknown if entry is None else logprobs_to_proto(entry) for entry in delta.prompt_logprobs)
        proto.prompt_logprobs.positions.extend(entries)
    if delta.times is not None:
        proto.times.queue_s, proto.times.prefill_s = delta.times.queue_s, delta.times.prefill_s
    return proto


def delta_from_proto(proto: Any, request_id: str) -> TokenDelta:
    """`request_id`: what `proto.stream_id` stands for."""
    return TokenDelta(
        request_id=request_id,
        index=proto.index,
        token_ids=tuple(proto.token_ids),
        logprobs=tuple(map(logprobs_from_proto, proto.logprobs)) if proto.logprobs else (),
        finish_reason=_REASONS[proto.finish_reason],
        stop_reason=_stop_reason(proto),
        num_cached_tokens=proto.num_cached_tokens,
        prompt_logprobs=_prompt_logprobs(proto.prompt_logprobs) if proto.HasField("prompt_logprobs") else None,
        error=proto.error if proto.HasField("error") else None,
        times=PhaseTimes(proto.times.queue_s, proto.times.prefill_s) if proto.HasField("times") else None,
        pooled=proto.pooled if proto.HasField("pooled") else None,
        form_complete=proto.form_complete,
        error_param=proto.error_param if proto.HasField("error_param") else None,
    )


def _stop_reason(proto: Any) -> int | str | None:
    kind = proto.WhichOneof("stop_reason")
    return None if kind is None else getattr(proto, kind)


def _prompt_logprobs(proto: Any) -> tuple[TokenLogprobs | None, ...]:
    return tuple(logprobs_from_proto(entry) if entry.token_ids else None for entry in proto.positions)


# --- KV blocks


def changes_to_proto(changes: BlockChanges, sequence: int) -> Any:
    """`changes.lost` is not sent: a snapshot is, instead."""
    stored, evicted = b"".join(changes.stored), b"".join(changes.evicted)
    return tokens_pb2.BlockChanges(sequence=sequence, cleared=changes.cleared, stored=stored, evicted=evicted)


def changes_from_proto(proto: Any) -> BlockChanges:
    return BlockChanges(_names(proto.stored), _names(proto.evicted), proto.cleared)


def _names(data: bytes) -> tuple[bytes, ...]:
    return tuple(data[at : at + NAME_BYTES] for at in range(0, len(data), NAME_BYTES))


# --- facts about an engine


def stats_to_proto(stats: EngineStats) -> Any:
    return tokens_pb2.EngineStats(**{name: getattr(stats, name) for name in _STATS})


def stats_from_proto(proto: Any) -> EngineStats:
    return EngineStats(**{name: getattr(proto, name) for name in _STATS})


def encode_stats(replica: str, stats: EngineStats) -> bytes:
    """The answer to the control call `stats`."""
    return bytes(tokens_pb2.ReplicaStats(replica=replica, stats=stats_to_proto(stats)).SerializeToString())


def decode_stats(data: bytes) -> tuple[str, EngineStats]:
    proto = tokens_pb2.ReplicaStats.FromString(data)
    return proto.replica, stats_from_proto(proto.stats)


def info_to_proto(info: EngineInfo) -> Any:
    proto = tokens_pb2.EngineInfo(**{name: getattr(info, name) for name in _INFO})
    proto.phases.extend(tokens_pb2.EngineInfo.Phase(name=name, seconds=seconds) for name, seconds in info.phases)
    defaults = {name: getattr(info.generation_defaults, name) for name in _GENERATION_DEFAULTS}
    proto.generation_defaults.CopyFrom(tokens_pb2.EngineInfo.GenerationDefaults(**defaults))
    proto.pooling.CopyFrom(_pooling_info_to_proto(info.pooling))
    return proto


def info_from_proto(proto: Any) -> EngineInfo:
    values: dict[str, Any] = {name: getattr(proto, name) for name in _INFO}
    values["eos_token_ids"] = tuple(proto.eos_token_ids)
    given = proto.generation_defaults
    defaults = {name: getattr(given, name) for name in _GENERATION_DEFAULTS if given.HasField(name)}
    phases = tuple((phase.name, phase.seconds) for phase in proto.phases)
    return EngineInfo(
        **values,
        generation_defaults=GenerationDefaults(**defaults),
        phases=phases,
        pooling=_pooling_info_from_proto(proto.pooling),
    )


def _pooling_info_to_proto(info: PoolingInfo) -> Any:
    proto = tokens_pb2.PoolingInfo(**{name: getattr(info, name) for name in _POOLING_INFO})
    proto.prompts.extend(tokens_pb2.PoolingInfo.Prompt(name=name, text=text) for name, text in info.prompts)
    return proto


def _pooling_info_from_proto(proto: Any) -> PoolingInfo:
    values: dict[str, Any] = {name: getattr(proto, name) for name in _POOLING_INFO}
    values |= {name: tuple(values[name]) for name in ("dimensions", "labels")}
    values["default_prompt"] = proto.default_prompt if proto.HasField("default_prompt") else None
    return PoolingInfo(**values, prompts=tuple((prompt.name, prompt.text) for prompt in proto.prompts))


def encode_status(status: ReplicaStatus) -> bytes:
    proto = tokens_pb2.ReplicaStatus(
        info=info_to_proto(status.info), stats=stats_to_proto(status.stats), clock=status.clock
    )
    proto.ranks.extend(tokens_pb2.RankStatus(**dataclasses.asdict(rank)) for rank in status.ranks)
    return bytes(proto.SerializeToString())


def decode_status(data: bytes) -> ReplicaStatus:
    proto = tokens_pb2.ReplicaStatus.FromString(data)
    ranks = tuple(_rank_from_proto(rank) for rank in proto.ranks)
    return ReplicaStatus(info_from_proto(proto.info), stats_from_proto(proto.stats), ranks, proto.clock)


def _rank_from_proto(proto: Any) -> RankStatus:
    values = {field.name: getattr(proto, field.name) for field in dataclasses.fields(RankStatus)}
    return RankStatus(**{**values, "gpu": proto.gpu if proto.HasField("gpu") else None})


_STATS = tuple(field.name for field in dataclasses.fields(EngineStats))
_GENERATION_DEFAULTS = tuple(field.name for field in dataclasses.fields(GenerationDefaults))
_POOLING = tuple(field.name for field in dataclasses.fields(PoolingParams))
_POOLING_INFO = tuple(field.name for field in dataclasses.fields(PoolingInfo) if field.name != "prompts")
_NESTED = ("phases", "generation_defaults", "pooling")
_INFO = tuple(field.name for field in dataclasses.fields(EngineInfo) if field.name not in _NESTED)

from octavo.v1 import sampling_pb2 as _sampling_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_ABORT: _ClassVar[FinishReason]
    FINISH_REASON_ERROR: _ClassVar[FinishReason]
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_ABORT: FinishReason
FINISH_REASON_ERROR: FinishReason

class TokenBatch(_message.Message):
    __slots__ = ("deltas", "stats", "accepted", "blocks", "stats_age_s", "last")
    DELTAS_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    STATS_AGE_S_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    deltas: _containers.RepeatedCompositeFieldContainer[TokenDelta]
    stats: EngineStats
    accepted: _containers.RepeatedScalarFieldContainer[int]
    blocks: _containers.RepeatedCompositeFieldContainer[BlockChanges]
    stats_age_s: float
    last: bool
    def __init__(self, deltas: _Optional[_Iterable[_Union[TokenDelta, _Mapping]]] = ..., stats: _Optional[_Union[EngineStats, _Mapping]] = ..., accepted: _Optional[_Iterable[int]] = ..., blocks: _Optional[_Iterable[_Union[BlockChanges, _Mapping]]] = ..., stats_age_s: _Optional[float] = ..., last: _Optional[bool] = ...) -> None: ...

class BlockChanges(_message.Message):
    __slots__ = ("sequence", "cleared", "stored", "evicted")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    CLEARED_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    cleared: bool
    stored: bytes
    evicted: bytes
    def __init__(self, sequence: _Optional[int] = ..., cleared: _Optional[bool] = ..., stored: _Optional[bytes] = ..., evicted: _Optional[bytes] = ...) -> None: ...

class StreamEnd(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TokenDelta(_message.Message):
    __slots__ = ("stream_id", "index", "token_ids", "logprobs", "finish_reason", "stop_token_id", "stop_string", "num_cached_tokens", "prompt_logprobs", "error", "times", "pooled", "form_complete", "error_param")
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    STOP_STRING_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    POOLED_FIELD_NUMBER: _ClassVar[int]
    FORM_COMPLETE_FIELD_NUMBER: _ClassVar[int]
    ERROR_PARAM_FIELD_NUMBER: _ClassVar[int]
    stream_id: int
    index: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprobs]
    finish_reason: FinishReason
    stop_token_id: int
    stop_string: str
    num_cached_tokens: int
    prompt_logprobs: PromptLogprobs
    error: str
    times: PhaseTimes
    pooled: bytes
    form_complete: bool
    error_param: str
    def __init__(self, stream_id: _Optional[int] = ..., index: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprobs, _Mapping]]] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., stop_token_id: _Optional[int] = ..., stop_string: _Optional[str] = ..., num_cached_tokens: _Optional[int] = ..., prompt_logprobs: _Optional[_Union[PromptLogprobs, _Mapping]] = ..., error: _Optional[str] = ..., times: _Optional[_Union[PhaseTimes, _Mapping]] = ..., pooled: _Optional[bytes] = ..., form_complete: _Optional[bool] = ..., error_param: _Optional[str] = ...) -> None: ...

class PhaseTimes(_message.Message):
    __slots__ = ("queue_s", "prefill_s")
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    queue_s: float
    prefill_s: float
    def __init__(self, queue_s: _Optional[float] = ..., prefill_s: _Optional[float] = ...) -> None: ...

class TokenLogprobs(_message.Message):
    __slots__ = ("token_ids", "logprobs", "rank")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    rank: int
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ..., rank: _Optional[int] = ...) -> None: ...

class PromptLogprobs(_message.Message):
    __slots__ = ("positions",)
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    positions: _containers.RepeatedCompositeFieldContainer[TokenLogprobs]
    def __init__(self, positions: _Optional[_Iterable[_Union[TokenLogprobs, _Mapping]]] = ...) -> None: ...

class EngineStats(_message.Message):
    __slots__ = ("num_running", "num_waiting", "waiting_tokens", "kv_blocks_total", "kv_blocks_held", "kv_blocks_cached", "steps", "prompt_tokens", "generation_tokens", "prefix_queries", "prefix_hits", "preemptions", "last_step_at", "prefill_tokens", "first_tokens", "first_token_s", "step_s", "gap_s")
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_HELD_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_CACHED_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GENERATION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_QUERIES_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HITS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    LAST_STEP_AT_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    GAP_S_FIELD_NUMBER: _ClassVar[int]
    num_running: int
    num_waiting: int
    waiting_tokens: int
    kv_blocks_total: int
    kv_blocks_held: int
    kv_blocks_cached: int
    steps: int
    prompt_tokens: int
    generation_tokens: int
    prefix_queries: int
    prefix_hits: int
    preemptions: int
    last_step_at: float
    prefill_tokens: int
    first_tokens: int
    first_token_s: float
    step_s: float
    gap_s: float
    def __init__(self, num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., waiting_tokens: _Optional[int] = ..., kv_blocks_total: _Optional[int] = ..., kv_blocks_held: _Optional[int] = ..., kv_blocks_cached: _Optional[int] = ..., steps: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., generation_tokens: _Optional[int] = ..., prefix_queries: _Optional[int] = ..., prefix_hits: _Optional[int] = ..., preemptions: _Optional[int] = ..., last_step_at: _Optional[float] = ..., prefill_tokens: _Optional[int] = ..., first_tokens: _Optional[int] = ..., first_token_s: _Optional[float] = ..., step_s: _Optional[float] = ..., gap_s: _Optional[float] = ...) -> None: ...

class ReplicaStats(_message.Message):
    __slots__ = ("replica", "stats")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    replica: str
    stats: EngineStats
    def __init__(self, replica: _Optional[str] = ..., stats: _Optional[_Union[EngineStats, _Mapping]] = ...) -> None: ...

class ReplicaStatus(_message.Message):
    __slots__ = ("info", "stats", "ranks", "clock")
    INFO_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    CLOCK_FIELD_NUMBER: _ClassVar[int]
    info: EngineInfo
    stats: EngineStats
    ranks: _containers.RepeatedCompositeFieldContainer[RankStatus]
    clock: float
    def __init__(self, info: _Optional[_Union[EngineInfo, _Mapping]] = ..., stats: _Optional[_Union[EngineStats, _Mapping]] = ..., ranks: _Optional[_Iterable[_Union[RankStatus, _Mapping]]] = ..., clock: _Optional[float] = ...) -> None: ...

class RankStatus(_message.Message):
    __slots__ = ("rank", "stage", "tp_rank", "pid", "node", "gpu", "heartbeat_age_s")
    RANK_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    TP_RANK_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    GPU_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_AGE_S_FIELD_NUMBER: _ClassVar[int]
    rank: int
    stage: int
    tp_rank: int
    pid: int
    node: str
    gpu: int
    heartbeat_age_s: float
    def __init__(self, rank: _Optional[int] = ..., stage: _Optional[int] = ..., tp_rank: _Optional[int] = ..., pid: _Optional[int] = ..., node: _Optional[str] = ..., gpu: _Optional[int] = ..., heartbeat_age_s: _Optional[float] = ...) -> None: ...

class EngineInfo(_message.Message):
    __slots__ = ("model", "max_model_len", "vocab_size", "eos_token_ids", "dtype", "device", "block_size", "num_blocks", "phases", "generation_defaults", "quantization", "batch_invariant", "pooling", "kv_block_bytes", "weights_bytes", "steps_bytes")
    class GenerationDefaults(_message.Message):
        __slots__ = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens")
        TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
        TOP_P_FIELD_NUMBER: _ClassVar[int]
        TOP_K_FIELD_NUMBER: _ClassVar[int]
        MIN_P_FIELD_NUMBER: _ClassVar[int]
        REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
        MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
        temperature: float
        top_p: float
        top_k: int
        min_p: float
        repetition_penalty: float
        max_tokens: int
        def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., max_tokens: _Optional[int] = ...) -> None: ...
    class Phase(_message.Message):
        __slots__ = ("name", "seconds")
        NAME_FIELD_NUMBER: _ClassVar[int]
        SECONDS_FIELD_NUMBER: _ClassVar[int]
        name: str
        seconds: float
        def __init__(self, name: _Optional[str] = ..., seconds: _Optional[float] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PHASES_FIELD_NUMBER: _ClassVar[int]
    GENERATION_DEFAULTS_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    BATCH_INVARIANT_FIELD_NUMBER: _ClassVar[int]
    POOLING_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_BYTES_FIELD_NUMBER: _ClassVar[int]
    STEPS_BYTES_FIELD_NUMBER: _ClassVar[int]
    model: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    dtype: str
    device: str
    block_size: int
    num_blocks: int
    phases: _containers.RepeatedCompositeFieldContainer[EngineInfo.Phase]
    generation_defaults: EngineInfo.GenerationDefaults
    quantization: str
    batch_invariant: bool
    pooling: PoolingInfo
    kv_block_bytes: int
    weights_bytes: int
    steps_bytes: int
    def __init__(self, model: _Optional[str] = ..., max_model_len: _Optional[int] = ..., vocab_size: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., dtype: _Optional[str] = ..., device: _Optional[str] = ..., block_size: _Optional[int] = ..., num_blocks: _Optional[int] = ..., phases: _Optional[_Iterable[_Union[EngineInfo.Phase, _Mapping]]] = ..., generation_defaults: _Optional[_Union[EngineInfo.GenerationDefaults, _Mapping]] = ..., quantization: _Optional[str] = ..., batch_invariant: _Optional[bool] = ..., pooling: _Optional[_Union[PoolingInfo, _Mapping]] = ..., kv_block_bytes: _Optional[int] = ..., weights_bytes: _Optional[int] = ..., steps_bytes: _Optional[int] = ...) -> None: ...

class PoolingInfo(_message.Message):
    __slots__ = ("generates", "is_causal", "embedding_size", "pooling_type", "normalize", "is_matryoshka", "dimensions", "labels", "pair_types", "prompts", "default_prompt")
    class Prompt(_message.Message):
        __slots__ = ("name", "text")
        NAME_FIELD_NUMBER: _ClassVar[int]
        TEXT_FIELD_NUMBER: _ClassVar[int]
        name: str
        text: str
        def __init__(self, name: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...
    GENERATES_FIELD_NUMBER: _ClassVar[int]
    IS_CAUSAL_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_SIZE_FIELD_NUMBER: _ClassVar[int]
    POOLING_TYPE_FIELD_NUMBER: _ClassVar[int]
    NORMALIZE_FIELD_NUMBER: _ClassVar[int]
    IS_MATRYOSHKA_FIELD_NUMBER: _ClassVar[int]
    DIMENSIONS_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    PAIR_TYPES_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_PROMPT_FIELD_NUMBER: _ClassVar[int]
    generates: bool
    is_causal: bool
    embedding_size: int
    pooling_type: str
    normalize: bool
    is_matryoshka: bool
    dimensions: _containers.RepeatedScalarFieldContainer[int]
    labels: _containers.RepeatedScalarFieldContainer[str]
    pair_types: int
    prompts: _containers.RepeatedCompositeFieldContainer[PoolingInfo.Prompt]
    default_prompt: str
    def __init__(self, generates: _Optional[bool] = ..., is_causal: _Optional[bool] = ..., embedding_size: _Optional[int] = ..., pooling_type: _Optional[str] = ..., normalize: _Optional[bool] = ..., is_matryoshka: _Optional[bool] = ..., dimensions: _Optional[_Iterable[int]] = ..., labels: _Optional[_Iterable[str]] = ..., pair_types: _Optional[int] = ..., prompts: _Optional[_Iterable[_Union[PoolingInfo.Prompt, _Mapping]]] = ..., default_prompt: _Optional[str] = ...) -> None: ...

class Request(_message.Message):
    __slots__ = ("request_id", "prompt_token_ids", "params", "priority", "cache_salt", "bad_words_token_ids", "resume", "pooling", "more_prompts")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PARAMS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    BAD_WORDS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    POOLING_FIELD_NUMBER: _ClassVar[int]
    MORE_PROMPTS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    params: _sampling_pb2.SamplingParams
    priority: int
    cache_salt: str
    bad_words_token_ids: _containers.RepeatedCompositeFieldContainer[Tokens]
    resume: _containers.RepeatedCompositeFieldContainer[Resumed]
    pooling: PoolingParams
    more_prompts: _containers.RepeatedCompositeFieldContainer[Tokens]
    def __init__(self, request_id: _Optional[str] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., params: _Optional[_Union[_sampling_pb2.SamplingParams, _Mapping]] = ..., priority: _Optional[int] = ..., cache_salt: _Optional[str] = ..., bad_words_token_ids: _Optional[_Iterable[_Union[Tokens, _Mapping]]] = ..., resume: _Optional[_Iterable[_Union[Resumed, _Mapping]]] = ..., pooling: _Optional[_Union[PoolingParams, _Mapping]] = ..., more_prompts: _Optional[_Iterable[_Union[Tokens, _Mapping]]] = ...) -> None: ...

class PoolingParams(_message.Message):
    __slots__ = ("task", "pooling_type", "normalize", "dimensions", "use_activation", "skip_reading_prefix_cache")
    TASK_FIELD_NUMBER: _ClassVar[int]
    POOLING_TYPE_FIELD_NUMBER: _ClassVar[int]
    NORMALIZE_FIELD_NUMBER: _ClassVar[int]
    DIMENSIONS_FIELD_NUMBER: _ClassVar[int]
    USE_ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    SKIP_READING_PREFIX_CACHE_FIELD_NUMBER: _ClassVar[int]
    task: str
    pooling_type: str
    normalize: bool
    dimensions: int
    use_activation: bool
    skip_reading_prefix_cache: bool
    def __init__(self, task: _Optional[str] = ..., pooling_type: _Optional[str] = ..., normalize: _Optional[bool] = ..., dimensions: _Optional[int] = ..., use_activation: _Optional[bool] = ..., skip_reading_prefix_cache: _Optional[bool] = ...) -> None: ...

class Resumed(_message.Message):
    __slots__ = ("index", "token_ids")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    index: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, index: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Tokens(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Ingress(_message.Message):
    __slots__ = ("id", "address", "token")
    ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    id: str
    address: str
    token: str
    def __init__(self, id: _Optional[str] = ..., address: _Optional[str] = ..., token: _Optional[str] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("request", "ingress", "stream_id")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    INGRESS_FIELD_NUMBER: _ClassVar[int]
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    request: Request
    ingress: Ingress
    stream_id: int
    def __init__(self, request: _Optional[_Union[Request, _Mapping]] = ..., ingress: _Optional[_Union[Ingress, _Mapping]] = ..., stream_id: _Optional[int] = ...) -> None: ...

class GenerateReply(_message.Message):
    __slots__ = ("request", "capacity", "lost", "handed_over")
    class RequestFailure(_message.Message):
        __slots__ = ("message", "param", "not_found")
        MESSAGE_FIELD_NUMBER: _ClassVar[int]
        PARAM_FIELD_NUMBER: _ClassVar[int]
        NOT_FOUND_FIELD_NUMBER: _ClassVar[int]
        message: str
        param: str
        not_found: bool
        def __init__(self, message: _Optional[str] = ..., param: _Optional[str] = ..., not_found: _Optional[bool] = ...) -> None: ...
    class CapacityFailure(_message.Message):
        __slots__ = ("message", "retry_after_s")
        MESSAGE_FIELD_NUMBER: _ClassVar[int]
        RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
        message: str
        retry_after_s: int
        def __init__(self, message: _Optional[str] = ..., retry_after_s: _Optional[int] = ...) -> None: ...
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    HANDED_OVER_FIELD_NUMBER: _ClassVar[int]
    request: GenerateReply.RequestFailure
    capacity: GenerateReply.CapacityFailure
    lost: str
    handed_over: str
    def __init__(self, request: _Optional[_Union[GenerateReply.RequestFailure, _Mapping]] = ..., capacity: _Optional[_Union[GenerateReply.CapacityFailure, _Mapping]] = ..., lost: _Optional[str] = ..., handed_over: _Optional[str] = ...) -> None: ...

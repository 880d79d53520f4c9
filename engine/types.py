"""What crosses the engine's boundary: requests in, token deltas out, and the vLLM-shaped results users see.

Plain values. No torch, no tokenizer, no HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from octavo.engine.errors import RequestError, StepError
from octavo.engine.params import SamplingParams
from octavo.engine.pooling.info import GENERATES_ONLY, PoolingInfo
from octavo.engine.pooling.params import PoolingParams

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Resumed:
    """A sequence of a request that another engine began: it goes on behind `token_ids`, the tokens generated so far.

    `index` is its number within the request (0 … n-1). Without tokens it starts from the prompt.
    """

    index: int
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """Tokens in: one client request as the engine core takes it.

    `params.seed` is resolved (never None) by whoever made the request, so that a resubmission draws the same tokens.
    `bad_words_token_ids` are the token sequences that `params.bad_words` stand for.
    `resume`: the sequences that run, each as if it had never stopped; empty = all n, from the start.
    `arrival_time` is seconds on the maker's monotonic clock; the core only subtracts it from its own clock's values.
    `pooling`: nothing is generated; what is asked for is made of the prompt's hidden states. Resolved by whoever made
    the request (PoolingInfo.resolve); of `params` nothing counts then. `more_prompts`: such a request may have several
    prompts, of which each is a sequence; the first is `prompt_token_ids`.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    priority: int = 0  # lower is served first
    cache_salt: str | None = None
    arrival_time: float = 0.0
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    resume: tuple[Resumed, ...] = ()
    session_id: str | None = None  # the client's; for the router alone, replicas are not told
    pooling: PoolingParams | None = None
    more_prompts: tuple[tuple[int, ...], ...] = ()

    def prompt_of(self, index: int) -> tuple[int, ...]:
        """Of the sequence of that number."""
        return self.more_prompts[index - 1] if index and self.more_prompts else self.prompt_token_ids

    @property
    def prompts(self) -> tuple[tuple[int, ...], ...]:
        return (self.prompt_token_ids, *self.more_prompts)

    @property
    def sequences(self) -> tuple[Resumed, ...]:
        """The sequences that run, in order; each of them gets one finish reason."""
        count = self.params.n if self.pooling is None else len(self.prompts)
        return tuple(sorted(self.resume, key=lambda r: r.index)) or tuple(map(Resumed, range(count)))


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probabilities at one position, from the raw logits.

    `token_ids[0]` is the token that stands there (drawn, or of the prompt); the rest are the most likely ones, or those
    that were asked for, in descending order. `rank` is the first one's rank, 1 = most likely. The drawn token may occur
    again in the rest.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    rank: int


@dataclass(frozen=True, slots=True)
class PhaseTimes:
    """How long an engine had a request before its first token: waiting for a place in a step, then computing. Seconds.

    prefill_s: first chunk to first token; also what a preemption in between cost.
    """

    queue_s: float
    prefill_s: float


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """Tokens out: what one step added to one sequence of a request.

    `index` is the sequence's number within the request (0 … n-1). `token_ids` may be empty (an abort). When
    `finish_reason` is set, no further delta with that (request_id, index) follows. `stop_reason` is the stop token id
    that ended it (None for the model's own end token, as in vLLM). `prompt_logprobs` (first delta of index 0 only) has
    one entry per prompt token, the first None. `pooled`: float32 values, little-endian, of a request that asks for
    them; they come once, with the finish reason "stop". `error` explains finish_reason "error"; `error_param` names the
    request's field that is at fault, None: none is. `form_complete`: it stopped because its form allows no more, so the
    last token is part of the output and no stop token. `times` come with the request's first token from this engine, or
    what it pooled; deltas that say the same at other times are equal.
    """

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    error: str | None = None
    times: PhaseTimes | None = field(default=None, compare=False)
    pooled: bytes | None = None
    form_complete: bool = False
    error_param: str | None = None

    @property
    def ends_with_stop_token(self) -> bool:
        """Whether the last of the tokens ended the sequence, and is no part of its text."""
        return self.finish_reason == "stop" and not self.form_complete

    @property
    def failure(self) -> RequestError | StepError:
        """What `error` is as an exception."""
        message = self.error or "The engine failed on this request."
        return StepError(message) if self.error_param is None else RequestError(message, self.error_param)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of the core, and its counters since start. Times in seconds."""

    num_running: int = 0
    num_waiting: int = 0
    waiting_tokens: int = 0  # prompt tokens not yet computed of waiting requests
    kv_blocks_total: int = 0
    kv_blocks_held: int = 0
    kv_blocks_cached: int = 0
    steps: int = 0
    prompt_tokens: int = 0  # computed or found in the cache
    generation_tokens: int = 0
    prefix_queries: int = 0  # tokens looked up
    prefix_hits: int = 0  # tokens found
    preemptions: int = 0
    last_step_at: float = 0.0  # clock of the newest finished step
    prefill_tokens: int = 0  # prompt tokens not yet computed of running sequences
    first_tokens: int = 0  # requests that have got one
    first_token_s: float = 0.0  # from being queued here to their first token, all of them together
    step_s: float = 0.0  # that the ranks worked on steps
    gap_s: float = 0.0  # that they stood still between two steps, though the second was planned while the first ran

    @property
    def kv_usage(self) -> float:
        """Part of the KV pool that sequences hold, 0 … 1."""
        return self.kv_blocks_held / self.kv_blocks_total if self.kv_blocks_total else 0.0


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Sampling parameters the model's authors recommend, for what a request leaves open. None = no recommendation."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class RankStatus:
    """One rank of a replica, as the replica's own process sees it.

    node: where it runs, as Ray calls it (hex); empty = where the replica's own process does. gpu: the number of its
    device on that node, None on a CPU. heartbeat_age_s: seconds since its last sign of life; 0 in the same process.
    """

    rank: int
    stage: int
    tp_rank: int
    pid: int
    node: str = ""
    gpu: int | None = None
    heartbeat_age_s: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What a built engine is: facts read from its checkpoint or measured at start.

    `eos_token_ids`: tokens that end a sequence unless ignored. `phases`: (name, seconds) of the start-up, in order.
    `quantization`: number format of the weights, "none" for floats. `batch_invariant`: see EngineConfig. Bytes are the
    first rank's: `kv_block_bytes` of a block; of a GPU that was measured, else 0, `weights_bytes`, and `steps_bytes`
    for all else that steps need.
    """

    model: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    device: str
    block_size: int
    num_blocks: int
    generation_defaults: GenerationDefaults = GenerationDefaults()
    phases: tuple[tuple[str, float], ...] = ()
    quantization: str = "none"
    batch_invariant: bool = False
    pooling: PoolingInfo = GENERATES_ONLY
    kv_block_bytes: int = 0
    weights_bytes: int = 0
    steps_bytes: int = 0

    @property
    def kv_bytes(self) -> int:
        """Of the first rank's pool."""
        return self.num_blocks * self.kv_block_bytes


@dataclass(slots=True)
class Logprob:
    """One candidate token, as users see it in `CompletionOutput.logprobs`."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One sequence of a request, so far."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """Times on one monotonic clock, in seconds; None until it happened."""

    arrival_time: float = 0.0
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time


@dataclass(slots=True)
class RequestOutput:
    """What `LLM.generate` returns and `AsyncLLM.generate` yields; vLLM's shape."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    metrics: RequestMetrics = field(default_factory=RequestMetrics)

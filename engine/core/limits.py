"""Limits: what an engine can take, and whether a request ever fits in. Knows neither what runs nor what waits."""

from __future__ import annotations

from dataclasses import dataclass

from octavo.engine.errors import RequestError
from octavo.engine.params import MAX_LOGPROBS, SamplingParams
from octavo.engine.pooling.info import GENERATES_ONLY, PoolingInfo
from octavo.engine.pooling.params import PoolingParams
from octavo.engine.types import Request


@dataclass(frozen=True, slots=True)
class Limits:
    """What the scheduler must know of the model and the configuration (see EngineConfig for the meaning).

    stages: of the pipeline; as many steps should be in flight at a time. pooling: what becomes of prompts that are not
    gone on with.
    """

    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    max_num_queued_reqs: int | None = None
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0
    scheduling_policy: str = "fcfs"
    stages: int = 1
    pooling: PoolingInfo = GENERATES_ONLY

    def stops_of(self, params: SamplingParams) -> frozenset[int]:
        """The tokens that end a sequence."""
        return frozenset((*params.stop_token_ids, *(() if params.ignore_eos else self.eos_token_ids)))

    def check(self, request: Request) -> None:
        """Raise RequestError if the request can never run within these limits."""
        params, prompt = request.params, request.prompt_token_ids
        if not prompt:
            raise RequestError("The prompt is empty: at least one token is needed.", "prompt")
        if request.pooling is not None:
            self._check_pooling(request, request.pooling)
            return
        if not self.pooling.generates:
            raise RequestError("This model generates no text: it makes embeddings, scores or classes.", "model")
        if len(prompt) >= self.max_model_len:
            raise RequestError(
                f"The prompt has {len(prompt)} tokens, but the model's context holds {self.max_model_len} "
                f"(prompt and output together).",
                "prompt",
            )
        if min(prompt) < 0 or max(prompt) >= self.vocab_size:
            raise RequestError(f"The prompt has a token id outside of 0 … {self.vocab_size - 1}.", "prompt")
        for resumed in request.resume:
            if any(not 0 <= token < self.vocab_size for token in resumed.token_ids):
                raise RequestError(f"A token to resume from is outside of 0 … {self.vocab_size - 1}.", "resume")
        indices = [resumed.index for resumed in request.resume]
        if len(set(indices)) < len(indices) or any(not 0 <= index < params.n for index in indices):
            raise RequestError(f"resume must name sequences 0 … {params.n - 1}, each once.", "resume")
        params.check_vocab(self.vocab_size)
        if params.beams is not None and params.structured_outputs is not None:
            raise RequestError("Beam search cannot be had with structured output.", "structured_outputs")
        if params.beams is not None and params.beams.width > self.vocab_size - len(self.stops_of(params)):
            raise RequestError(f"The model has no {params.beams.width} tokens for as many beams to go on with.", "n")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(params, name)
            if value is not None and value > MAX_LOGPROBS:
                raise RequestError(f"{name} must be at most {MAX_LOGPROBS} (or -1 for all), got {value}.", name)

    def _check_pooling(self, request: Request, pooling: PoolingParams) -> None:
        known = self.vocab_size * self.pooling.pair_types
        for prompt in request.prompts:
            if not prompt:
                raise RequestError("A prompt is empty: at least one token is needed.", "prompt")
            if len(prompt) > self.max_model_len:
                raise RequestError(
                    f"The prompt has {len(prompt)} tokens, but the model's context holds {self.max_model_len}.",
                    "prompt",
                )
            if min(prompt) < 0 or max(prompt) >= known:
                raise RequestError(f"The prompt has a token id outside of 0 … {known - 1}.", "prompt")
        if request.params.n != 1:
            raise RequestError("A prompt is pooled once: n must be 1.", "n")
        if any(wanted.token_ids or not 0 <= wanted.index < len(request.prompts) for wanted in request.resume):
            raise RequestError(f"resume must name prompts 0 … {len(request.prompts) - 1}.", "resume")
        if self.pooling.resolve(pooling) != pooling:
            raise RequestError("The pooling parameters are not resolved.", "pooling")

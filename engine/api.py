"""LLM (offline) and AsyncLLM (streaming): what users import from `octavo.engine`."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from octavo.engine.assets import tokenizer_of
from octavo.engine.beam_search import BeamSearchOutput, BeamSearchParams, beams_of
from octavo.engine.build import Engine, build_engine
from octavo.engine.config import EngineConfig
from octavo.engine.errors import RankLost, RequestError
from octavo.engine.loop import EngineLoop
from octavo.engine.outputs import RequestState
from octavo.engine.params import SamplingParams
from octavo.engine.pooling.offline import OfflinePooling, progress
from octavo.engine.pooling.outputs import (
    ClassificationRequestOutput,
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
    ScoringRequestOutput,
)
from octavo.engine.pooling.params import PoolingParams
from octavo.engine.pooling.prompts import Fitting
from octavo.engine.requests import Prompt, make_request
from octavo.engine.text.tokenizer import Tokenizer
from octavo.engine.types import EngineInfo, EngineStats, Request, RequestOutput, TokenDelta

Message = dict[str, Any]
Params = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """An engine in this process, for batches: `LLM("smollm2-135m").generate(["Once upon a time"])`.

    `options` are the fields of EngineConfig. Not thread-safe. Raises ConfigError if it cannot start.
    """

    def __init__(self, model: str = "smollm2-135m", **options: Any) -> None:
        self.config = EngineConfig(model=model, **options)
        self._engine: Engine = build_engine(self.config)
        self._tokenizer = tokenizer_of(self.config)

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    def stats(self) -> EngineStats:
        return self._engine.core.stats()

    def get_tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the checkpoint's generation_config.json recommends, else the defaults."""
        return _default_params(self.info)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts, each a string or a list of token ids; results come in the order of the prompts.

        `sampling_params`: one for all, one each, or None for the model's defaults. `use_tqdm`: show a progress bar.
        Raises RequestError, before anything is computed, if a prompt or its parameters can never run.
        """
        listed = _as_list(prompts)
        params = self._params_for(len(listed), sampling_params)
        if priority is not None and len(priority) != len(listed):
            raise RequestError(f"{len(priority)} priorities were given for {len(listed)} prompts.", "priority")
        requests = [
            make_request(self._tokenizer, prompt, p, priority=priority[i] if priority else 0)
            for i, (prompt, p) in enumerate(zip(listed, params, strict=True))
        ]
        texts = [prompt if isinstance(prompt, str) else None for prompt in listed]
        return self._run(requests, texts, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several: each a list of {"role": …, "content": …}."""
        reserved = {"tools", "add_generation_prompt", "continue_final_message", "chat_template"}
        clash = sorted(reserved & (chat_template_kwargs or {}).keys())
        if clash:
            raise RequestError(f"chat_template_kwargs must not name {clash[0]}.", "chat_template_kwargs")
        several = bool(messages) and not isinstance(messages[0], dict)
        conversations: Any = messages if several else [messages]
        texts = [
            self._tokenizer.apply_chat_template(
                conversation,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                chat_template=chat_template,
                **(chat_template_kwargs or {}),
            )
            for conversation in conversations
        ]
        params = self._params_for(len(texts), sampling_params)
        requests = []
        for text, p in zip(texts, params, strict=True):
            token_ids = self._tokenizer.encode(text, add_special_tokens=False)  # the template wrote them
            requests.append(make_request(self._tokenizer, token_ids, p))
        return self._run(requests, texts, use_tqdm)

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, *, use_tqdm: bool = False
    ) -> list[BeamSearchOutput]:
        """The `params.beam_width` best continuations of each prompt (a string or token ids), the best first.

        The beams of a prompt share the KV blocks of what they have in common. Raises RequestError as `generate` does.
        """
        wanted = params.sampling_params()
        outputs = self.generate(prompts, wanted, use_tqdm=use_tqdm)
        return [beams_of(output, params, self._tokenizer) for output in outputs]

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | None = None,
        *,
        use_tqdm: bool = True,
        truncate_prompt_tokens: int | None = None,
        prompt_name: str | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """One vector per prompt, `.outputs.embedding`: of a model made for that, or of one that generates, which then
        gives its last token's hidden state.

        truncate_prompt_tokens: cut longer prompts to so many tokens, -1 = as many as the model takes; else they are
        refused. prompt_name: one of the model's own prompts, put before each text; None = its default, if it has one.
        """
        listed = _as_list(prompts)
        with progress(len(listed), use_tqdm) as advance:
            return self._pooling(truncate_prompt_tokens, prompt_name).embed(listed, pooling_params, advance)

    def classify(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | None = None,
        *,
        use_tqdm: bool = True,
        truncate_prompt_tokens: int | None = None,
    ) -> list[ClassificationRequestOutput]:
        """The probability of each of the model's classes, `.outputs.probs`; their names are `info.pooling.labels`."""
        listed = _as_list(prompts)
        with progress(len(listed), use_tqdm) as advance:
            return self._pooling(truncate_prompt_tokens).classify(listed, pooling_params, advance)

    def score(
        self,
        data_1: str | Sequence[str],
        data_2: str | Sequence[str],
        pooling_params: PoolingParams | None = None,
        *,
        use_tqdm: bool = True,
        truncate_prompt_tokens: int | None = None,
    ) -> list[ScoringRequestOutput]:
        """How well each text of `data_2` fits its own of `data_1`, or the only one there, `.outputs.score`: by a
        cross-encoder, or as the cosine of their embeddings."""
        first, second = ([data] if isinstance(data, str) else list(data) for data in (data_1, data_2))
        with progress(len(first) + len(second), use_tqdm) as advance:
            return self._pooling(truncate_prompt_tokens).score(first, second, pooling_params, advance)

    def encode(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | None = None,
        *,
        use_tqdm: bool = True,
        truncate_prompt_tokens: int | None = None,
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """One vector per prompt, `.outputs.data`, of the kind that `pooling_params.task` says."""
        listed = _as_list(prompts)
        with progress(len(listed), use_tqdm) as advance:
            return self._pooling(truncate_prompt_tokens).encode(listed, pooling_params or PoolingParams(), advance)

    def close(self) -> None:
        self._engine.core.close()

    def _pooling(self, keep: int | None, prompt_name: str | None = None) -> OfflinePooling:
        return OfflinePooling(self._engine.core, self._tokenizer, self.info, Fitting(keep), prompt_name)

    def _params_for(self, count: int, given: Params) -> list[SamplingParams]:
        if given is None:
            given = self.get_default_sampling_params()
        if isinstance(given, SamplingParams):
            return [given] * count
        if len(given) != count:
            raise RequestError(f"{len(given)} SamplingParams were given for {count} prompts.", "sampling_params")
        return list(given)

    def _run(self, requests: list[Request], texts: Sequence[str | None], show: bool) -> list[RequestOutput]:
        core = self._engine.core
        states = [RequestState(r, text, self._tokenizer) for r, text in zip(requests, texts, strict=True)]
        by_id = {state.request.request_id: state for state in states}
        for request in requests:
            core.scheduler.check(request)
        core.prepare(requests)
        try:
            for request in requests:
                core.add(request)
            with _progress(len(requests), show) as advance:
                while core.has_work:
                    now = time.monotonic()
                    for delta in core.step():
                        state = by_id[delta.request_id]
                        if state.finished:
                            continue
                        state.take(delta, now)
                        if state.finished:
                            core.abort(delta.request_id)  # what a stop string ended still runs
                            advance(state.output)
        finally:
            for request in requests:
                core.abort(request.request_id)
            while core.has_work:  # steps in flight
                core.step()
        return [state.output for state in states]


class AsyncLLM:
    """An engine on a thread of this process, for streams. Use from one event loop."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self._engine = build_engine(config)
        self._tokenizer = tokenizer_of(config)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._queues: dict[str, asyncio.Queue[TokenDelta]] = {}
        self._engine_loop = EngineLoop(self._engine.core, self._hand_over)
        self._engine_loop.start()

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    def stats(self) -> EngineStats:
        return self._engine_loop.stats()

    def get_tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        return _default_params(self.info)

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Yield the request's output so far, each time there is more. Leaving the iteration aborts the request.

        Raises RequestError or CapacityError at the first step of the iteration, StepError if the engine fails it.
        """
        self._loop = asyncio.get_running_loop()
        params = sampling_params or self.get_default_sampling_params()
        request = make_request(self._tokenizer, prompt, params, request_id, priority=priority, cache_salt=cache_salt)
        state = RequestState(request, prompt if isinstance(prompt, str) else None, self._tokenizer)
        queue: asyncio.Queue[TokenDelta] = asyncio.Queue()
        if request.request_id in self._queues:
            raise RequestError(f"request_id {request.request_id!r} is in use by a running request.", "request_id")
        self._queues[request.request_id] = queue
        try:
            self._engine_loop.submit(request)
            while not state.finished:
                delta = await queue.get()
                state.take(delta, time.monotonic())
                while not queue.empty() and not state.finished:
                    state.take(queue.get_nowait(), time.monotonic())
                yield _snapshot(state.output)
        finally:
            del self._queues[request.request_id]
            self._engine_loop.abort(request.request_id)

    async def abort(self, request_id: str) -> None:
        """End a request; its iteration ends with finish reason "abort"."""
        self._engine_loop.abort(request_id)

    async def check_health(self) -> None:
        """Raise RankLost if the engine has failed."""
        if self._engine_loop.failure is not None:
            raise RankLost(f"The engine has failed: {self._engine_loop.failure}")

    def shutdown(self, drain_s: float = 0.0) -> None:
        """Let live requests finish for up to `drain_s` seconds, end the others, stop the thread."""
        self._engine_loop.stop(drain_s)

    def _hand_over(self, deltas: list[TokenDelta]) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._dispatch, deltas)

    def _dispatch(self, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            queue = self._queues.get(delta.request_id)
            if queue is not None:
                queue.put_nowait(delta)


def _default_params(info: EngineInfo) -> SamplingParams:
    """SamplingParams with what the checkpoint recommends, where it says anything."""
    recommended = asdict(info.generation_defaults)
    return SamplingParams(**{name: value for name, value in recommended.items() if value is not None})


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many → many. A list of ints is one prompt of token ids."""
    if isinstance(prompts, str):
        return [prompts]
    listed = list(prompts)
    if listed and all(isinstance(item, int) for item in listed):
        return [listed]  # type: ignore[list-item]
    return listed  # type: ignore[return-value]


def _snapshot(output: RequestOutput) -> RequestOutput:
    """A copy that later tokens do not change."""
    outputs = [
        replace(c, token_ids=list(c.token_ids), logprobs=None if c.logprobs is None else list(c.logprobs))
        for c in output.outputs
    ]
    return replace(output, outputs=outputs, metrics=copy.copy(output.metrics))


class _progress:
    """A progress bar over finished requests with the rate of generated tokens; nothing when not shown."""

    def __init__(self, total: int, show: bool) -> None:
        self._bar: Any = None
        self._tokens = 0
        if show and total:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("Generating"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[rate]}"),
                transient=False,
            )
            self._task = self._bar.add_task("", total=total, rate="")
            self._started = time.monotonic()

    def __enter__(self) -> Callable[[RequestOutput], None]:
        if self._bar is not None:
            self._bar.start()
        return self._advance

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _advance(self, output: RequestOutput) -> None:
        if self._bar is None:
            return
        self._tokens += sum(len(c.token_ids) for c in output.outputs)
        rate = self._tokens / (time.monotonic() - self._started)
        self._bar.update(self._task, advance=1, rate=f"{rate:,.0f} tokens/s")

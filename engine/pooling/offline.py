"""Embeddings, classes and scores of texts by an engine in this process: what is behind LLM's methods of these names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from octavo.engine.core.engine import EngineCore
from octavo.engine.errors import RequestError, StepError
from octavo.engine.pooling.outputs import (
    ClassificationOutput,
    ClassificationRequestOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
    cosine,
    floats,
    paired,
)
from octavo.engine.pooling.params import PoolingParams
from octavo.engine.pooling.prompts import Fitting, Input, PromptFitter, pooling_request, prompted
from octavo.engine.requests import Prompt, new_request_id
from octavo.engine.text.tokenizer import Tokenizer
from octavo.engine.types import EngineInfo, Request

Advance = Callable[[], None]


@dataclass(frozen=True, slots=True)
class OfflinePooling:
    """One engine that nobody else uses meanwhile. `advance` is called as each prompt is done.

    Every method raises RequestError, before anything is computed, for prompts and parameters that cannot be meant.
    """

    core: EngineCore
    tokenizer: Tokenizer
    info: EngineInfo
    fitting: Fitting
    prompt_name: str | None = None

    def embed(
        self, prompts: Sequence[Prompt], params: PoolingParams | None, advance: Advance
    ) -> list[EmbeddingRequestOutput]:
        done = self.encode(prompts, (params or PoolingParams()).replace(task="embed"), advance)
        return [_as(each, EmbeddingOutput(each.outputs.data)) for each in done]

    def classify(
        self, prompts: Sequence[Prompt], params: PoolingParams | None, advance: Advance
    ) -> list[ClassificationRequestOutput]:
        done = self.encode(prompts, (params or PoolingParams()).replace(task="classify"), advance)
        return [_as(each, ClassificationOutput(each.outputs.data)) for each in done]

    def score(
        self, first: Sequence[str], second: Sequence[str], params: PoolingParams | None, advance: Advance
    ) -> list[ScoringRequestOutput]:
        """Of each second text with its own first one, or with the only one."""
        try:
            places = paired(len(first), len(second))
        except ValueError as error:
            raise RequestError(f"{error}.", "data_1") from None
        pairs = [(first[place], text) for place, text in zip(places, second, strict=True)]
        if self.info.pooling.scores_pairs:
            wanted = self.info.pooling.resolve((params or PoolingParams()).replace(task="classify"))
            found = self._pool(pairs, wanted, advance)
            return [_as(each, ScoringOutput(each.outputs.data[0])) for each in found]
        if not self.info.pooling.embeds:
            labels = len(self.info.pooling.labels)
            raise RequestError(f"This model tells {labels} classes apart: it cannot score pairs of texts.", "model")
        embedded = self.embed([*first, *second], params, advance)
        ones, others = embedded[: len(first)], embedded[len(first) :]
        return [_cosine(ones[place], other) for place, other in zip(places, others, strict=True)]

    def encode(
        self, prompts: Sequence[Prompt], params: PoolingParams, advance: Advance
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        inputs = [prompt if isinstance(prompt, str) else _ids(prompt) for prompt in prompts]
        return self._pool(
            inputs, self.info.pooling.resolve(params), advance, prompted(self.info.pooling, self.prompt_name)
        )

    def _pool(
        self, inputs: Sequence[Input], params: PoolingParams, advance: Advance, before: str = ""
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        names = [f"prompts[{i}]" for i in range(len(inputs))]
        prompts = PromptFitter(self.tokenizer, self.info, self.fitting).of_inputs(inputs, names, before)
        requests = [pooling_request(new_request_id(), [ids], params) for ids in prompts]
        for request in requests:
            self.core.scheduler.check(request)
        found = {
            request.request_id: PoolingRequestOutput(request.request_id, PoolingOutput([])) for request in requests
        }
        try:
            self._run(requests, found, advance)
        finally:
            for request in requests:
                self.core.abort(request.request_id)
            while self.core.has_work:  # steps in flight
                self.core.step()
        for request in requests:
            found[request.request_id].prompt_token_ids = list(request.prompt_token_ids)
        return list(found.values())

    def _run(
        self, requests: Sequence[Request], found: dict[str, PoolingRequestOutput[PoolingOutput]], advance: Advance
    ) -> None:
        for request in requests:
            self.core.add(request)
        while self.core.has_work:
            for delta in self.core.step():
                if delta.error is not None:
                    raise StepError(delta.error)
                if delta.pooled is not None:
                    output = found[delta.request_id]
                    output.outputs = PoolingOutput(floats(delta.pooled))
                    output.num_cached_tokens = delta.num_cached_tokens
                    advance()


@contextmanager
def progress(total: int, show: bool) -> Iterator[Advance]:
    """A bar over finished prompts; nothing when not shown."""
    if not show or not total:
        yield lambda: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(TextColumn("Pooling"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.update(task, advance=1)


def _as(done: PoolingRequestOutput[PoolingOutput], outputs: object) -> PoolingRequestOutput:  # type: ignore[type-arg]
    return PoolingRequestOutput(done.request_id, outputs, done.prompt_token_ids, done.num_cached_tokens)


def _cosine(one: EmbeddingRequestOutput, other: EmbeddingRequestOutput) -> ScoringRequestOutput:
    score = ScoringOutput(cosine(one.outputs.embedding, other.outputs.embedding))
    tokens = [*one.prompt_token_ids, *other.prompt_token_ids]
    return PoolingRequestOutput(other.request_id, score, tokens, one.num_cached_tokens + other.num_cached_tokens)


def _ids(prompt: object) -> list[int]:
    if isinstance(prompt, Sequence) and all(isinstance(t, int) and not isinstance(t, bool) for t in prompt):
        return list(prompt)
    raise RequestError("A prompt must be a string or a list of token ids.", "prompts")

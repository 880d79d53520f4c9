"""RequestState: token deltas of one request → the RequestOutput that users see.

Knows tokens and text. The engine behind may be in this process or elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

from octavo.engine.text.stream import TextStream
from octavo.engine.text.tokenizer import Tokenizer
from octavo.engine.types import (
    CompletionOutput,
    Logprob,
    Request,
    RequestMetrics,
    RequestOutput,
    TokenDelta,
    TokenLogprobs,
)


class RequestState:
    """Collects one request's output. `take` each of its deltas, in order; `output` is the sum so far."""

    def __init__(self, request: Request, prompt: str | None, tokenizer: Tokenizer) -> None:
        params = request.params
        self.request = request
        self._tokenizer = tokenizer
        self._ranked = not params.logprob_token_ids  # candidates are the likeliest ones
        self._streams = [TextStream(tokenizer, request.prompt_token_ids, params) for _ in range(params.n)]
        self.output = RequestOutput(
            request_id=request.request_id,
            prompt=prompt,
            prompt_token_ids=list(request.prompt_token_ids),
            outputs=[
                CompletionOutput(
                    index=i,
                    text="",
                    token_ids=[],
                    cumulative_logprob=None if params.logprobs is None else 0.0,
                    logprobs=None if params.logprobs is None else [],
                )
                for i in range(params.n)
            ],
            metrics=RequestMetrics(arrival_time=request.arrival_time),
        )

    @property
    def finished(self) -> bool:
        return self.output.finished

    def take(self, delta: TokenDelta, now: float) -> None:
        """Add a delta that arrived at `now` (seconds, the clock of request.arrival_time).

        Raises StepError if the engine ended the sequence with an error, RequestError if the request is at fault. A
        sequence that a stop string has ended ignores what still comes; when all have ended, `finished` is true and the
        caller aborts what still runs.
        """
        if delta.error is not None:
            raise delta.failure
        completion = self.output.outputs[delta.index]
        if completion.finished():
            return
        if delta.prompt_logprobs is not None:
            self.output.prompt_logprobs = [entry and self._entry(entry) for entry in delta.prompt_logprobs]
        if delta.index == 0:
            self.output.num_cached_tokens = delta.num_cached_tokens
        text = self._streams[delta.index].push(
            delta.token_ids, delta.finish_reason is not None, delta.ends_with_stop_token
        )
        completion.text += text.text
        completion.token_ids.extend(delta.token_ids[: text.num_tokens_used])
        self._add_logprobs(completion, delta.logprobs[: text.num_tokens_used])
        if text.stop is not None:
            completion.finish_reason, completion.stop_reason = "stop", text.stop
        elif delta.finish_reason is not None:
            completion.finish_reason, completion.stop_reason = delta.finish_reason, delta.stop_reason
        metrics = self.output.metrics
        if delta.token_ids:
            metrics.first_token_time = metrics.first_token_time or now
            metrics.last_token_time = now
        if all(c.finished() for c in self.output.outputs):
            self.output.finished = True
            metrics.finished_time = now

    def _add_logprobs(self, completion: CompletionOutput, logprobs: Sequence[TokenLogprobs]) -> None:
        if completion.logprobs is None or completion.cumulative_logprob is None:
            return
        for entry in logprobs:
            completion.logprobs.append(self._entry(entry))
            completion.cumulative_logprob += entry.logprobs[0]

    def _entry(self, entry: TokenLogprobs) -> dict[int, Logprob]:
        """{token: Logprob} of one position: the top candidates by rank, and the token that stands there."""
        found = {
            token: Logprob(logprob, rank if self._ranked else None, self._tokenizer.token_text(token))
            for rank, (token, logprob) in enumerate(zip(entry.token_ids[1:], entry.logprobs[1:], strict=True), 1)
        }
        own = entry.token_ids[0]
        found.setdefault(own, Logprob(entry.logprobs[0], entry.rank, self._tokenizer.token_text(own)))
        return found

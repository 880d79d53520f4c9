"""One client request's generation: token deltas in, pieces of text out, of all its prompts and sequences.

Knows engines through EngineClient and text through TextStream. Does not know OpenAI's shapes: those are made of pieces.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from octavo.cluster.ingress import replies
from octavo.cluster.ingress.client import EngineClient
from octavo.cluster.ingress.errors import Interrupted
from octavo.cluster.ingress.prompts import Prompt
from octavo.cluster.ingress.reading.parts import PlainReader, Reader
from octavo.cluster.ingress.reading.reading import Reading
from octavo.cluster.ingress.reading.thinking import ThoughtCounter
from octavo.cluster.observability.metrics import Finished, IngressMetrics
from octavo.cluster.observability.traces import NO_TRACE, Trace
from octavo.engine.errors import CapacityError
from octavo.engine.text.stream import TextStream
from octavo.engine.text.tokenizer import Tokenizer
from octavo.engine.types import FinishReason, Request, TokenDelta, TokenLogprobs


@dataclass(slots=True)
class Piece:
    """What became certain of one sequence: text that no stop string can take back, and the tokens it is made of.

    `index`: the choice's number among all of the client's request. `first`: the sequence's first piece.
    """

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    first: bool = False


def join(pieces: Sequence[Piece]) -> Piece:
    """The pieces of one choice, in order, as one."""
    first, last = pieces[0], pieces[-1]
    return Piece(
        index=first.index,
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(token for piece in pieces for token in piece.token_ids),
        logprobs=tuple(entry for piece in pieces for entry in piece.logprobs),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        first=True,
    )


class Choice:
    """One sequence on its way to the client. Holds tokens back until some of their text is certain."""

    def __init__(
        self,
        index: int,
        stream: TextStream,
        has_text: bool = True,
        counter: ThoughtCounter | None = None,
        interval: int = 1,
    ) -> None:
        """interval: tokens that a piece has at least, but for the first and the last one."""
        self.index = index
        self.counter = counter
        self._has_text = has_text
        self.num_tokens = 0  # generated, as far as they were used
        self.finish_reason: FinishReason | None = None
        self._stream = stream
        self._first = True
        self._interval = interval
        self._text = ""
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprobs] = []

    def push(self, delta: TokenDelta) -> Piece | None:
        """What `delta` makes certain; None if that is nothing yet. Not to be called after the sequence has ended."""
        ended = delta.finish_reason is not None
        pushed = self._stream.push(delta.token_ids, ended, delta.ends_with_stop_token)
        self.num_tokens += pushed.num_tokens_used
        if self.counter is not None:
            self.counter.push(delta.token_ids[: pushed.num_tokens_used])
        self._tokens.extend(delta.token_ids[: pushed.num_tokens_used])
        self._logprobs.extend(delta.logprobs[: pushed.num_tokens_used])
        self.finish_reason, stop_reason = delta.finish_reason, delta.stop_reason
        if pushed.stop is not None:
            self.finish_reason, stop_reason = "stop", pushed.stop
        self._text += pushed.text
        if self.finish_reason is None and self._holds_back:
            return None
        piece = Piece(
            index=self.index,
            text=self._text,
            token_ids=tuple(self._tokens),
            logprobs=tuple(self._logprobs),
            finish_reason=self.finish_reason,
            stop_reason=stop_reason,
            first=self._first,
        )
        self._first, self._text = False, ""
        self._tokens.clear()
        self._logprobs.clear()
        return piece

    @property
    def _holds_back(self) -> bool:
        if self._has_text and not self._text:
            return True
        return not self._first and len(self._tokens) < self._interval


class Generation:
    """The engine requests of one client request, run side by side.

    `requests[i]` continues `prompts[i]`; its sequence j is the choice i × n + j. Counters are valid at any time and
    final once `pieces` has ended, however it did. only_scores: what is generated is thrown away. `readers[i]` reads the
    text of choice i as `reading` has it (None: as mere text), for a dialect that tells the parts of an answer apart.
    """

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer,
        metrics: IngressMetrics,
        prompts: Sequence[Prompt],
        requests: Sequence[Request],
        arrival_time: float,
        *,
        only_scores: bool = False,
        reading: Reading | None = None,
        stream_interval: int = 1,
        trace: Trace = NO_TRACE,
    ) -> None:
        self.prompts = prompts
        self.requests = requests
        self.n = requests[0].params.n
        reading = reading or Reading()
        self.choices = [
            Choice(
                index,
                TextStream(tokenizer, request.prompt_token_ids, request.params, reading.shown_tokens),
                request.params.detokenize,
                reading.counters[index] if reading.counters else None,
                stream_interval,
            )
            for index, request in enumerate(request for request in requests for _ in range(self.n))
        ]
        self.readers: tuple[Reader, ...] = reading.readers or tuple(PlainReader() for _ in self.choices)
        self.num_prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        # one entry per prompt token; all None until the engine has sent them
        self.prompt_logprobs: list[Sequence[TokenLogprobs | None]] = [(None,) * len(p.token_ids) for p in prompts]
        self.num_cached_tokens = 0
        self.ttft_s: float | None = None
        self._client = client
        self._only_scores = only_scores
        self._trace = trace
        self._metrics = metrics
        self._arrival_time = arrival_time

    def usage(self) -> dict[str, Any]:
        usage = replies.usage(self.num_prompt_tokens, self.num_completion_tokens, self.num_cached_tokens)
        if counters := [choice.counter for choice in self.choices if choice.counter is not None]:
            thoughts = sum(counter.num_tokens for counter in counters)
            usage["completion_tokens_details"] = {"reasoning_tokens": thoughts}
        return usage

    @property
    def num_completion_tokens(self) -> int:
        return 0 if self._only_scores else sum(choice.num_tokens for choice in self.choices)

    @property
    def finish_reasons(self) -> tuple[FinishReason | None, ...]:
        """Of each choice; None: it has not ended."""
        return tuple(choice.finish_reason for choice in self.choices)

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """All pieces, in order within each choice. Closing it aborts what is unfinished.

        Raises what EngineClient.generate raises; StepError or Interrupted when the engine ends a sequence unasked.
        """
        if len(self.requests) == 1:
            async with aclosing(self._run(0)) as pieces:
                async for piece in pieces:
                    yield piece
            return
        async with aclosing(_side_by_side([self._run(number) for number in range(len(self.requests))])) as pieces:
            async for piece in pieces:
                yield piece

    async def _run(self, number: int) -> AsyncGenerator[Piece, None]:
        request = self.requests[number]
        choices = self.choices[number * self.n : (number + 1) * self.n]
        clock = _Clock(self._metrics, self._arrival_time)
        journey = self._trace.journey(number)
        unfinished, ended = self.n, None
        try:
            async with aclosing(self._client.generate(request, journey)) as deltas:
                async for delta in deltas:
                    choice = choices[delta.index]
                    if choice.finish_reason is not None:
                        continue  # ended by a stop string while its siblings go on
                    if clock.first_at is None:
                        self._metrics.started(len(request.prompt_token_ids), request.params)
                        self.num_cached_tokens += delta.num_cached_tokens
                    if delta.prompt_logprobs is not None:
                        self.prompt_logprobs[number] = delta.prompt_logprobs
                    _raise_if_ended_unasked(delta)
                    if delta.token_ids:
                        clock.tick(delta.index, len(delta.token_ids))
                        if self.ttft_s is None:
                            self.ttft_s = clock.last_at[delta.index] - self._arrival_time
                    piece = choice.push(delta)
                    if choice.finish_reason is not None:
                        unfinished -= 1
                        ended = choice.finish_reason
                    if piece is not None:
                        yield piece
                    if not unfinished:
                        break
                else:
                    raise Interrupted("The engine ended the request early; it may be tried again.")
        except CapacityError:
            self._metrics.rejected("max_num_queued_reqs")
            raise
        except (GeneratorExit, asyncio.CancelledError):
            clock.stop("abort" if unfinished or ended is None else ended, choices)
            raise
        except Exception:
            clock.stop("error", choices)
            raise
        else:
            clock.stop(ended or "error", choices)
        finally:
            journey.ended()


class _Clock:
    """When the tokens of one engine request came."""

    def __init__(self, metrics: IngressMetrics, arrival_time: float) -> None:
        self._metrics = metrics
        self._arrival_time = arrival_time
        self.first_at: float | None = None
        self.last_at: dict[int, float] = {}

    def tick(self, sequence: int, tokens: int) -> None:
        now = time.monotonic()
        if self.first_at is None:
            self.first_at = now
            self._metrics.first_token(now - self._arrival_time)
        if sequence in self.last_at:
            self._metrics.next_tokens(now - self.last_at[sequence], tokens)
        self.last_at[sequence] = now

    def stop(self, reason: str, choices: Sequence[Choice]) -> None:
        now = time.monotonic()
        decode_s = max(self.last_at.values(), default=now) - (self.first_at or now)
        tokens = sum(choice.num_tokens for choice in choices)
        self._metrics.finished(Finished(reason, tokens, now - self._arrival_time, max(0.0, decode_s)))


def _raise_if_ended_unasked(delta: TokenDelta) -> None:
    if delta.finish_reason == "error":
        raise delta.failure
    if delta.finish_reason == "abort":
        raise Interrupted("The engine ended the request early; it may be tried again.")


async def _side_by_side(sources: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[Piece, None]:
    """What the sources bring, as it comes; the first exception of one ends all."""
    # One place: a slow client thus leaves its tokens in the mailboxes behind the sources, merged.
    waiting: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue(maxsize=1)

    async def pump(source: AsyncGenerator[Piece, None]) -> None:
        try:
            async with aclosing(source) as pieces:
                async for piece in pieces:
                    await waiting.put(piece)
        except Exception as error:
            await waiting.put(error)
        else:
            await waiting.put(None)

    pumps = [asyncio.create_task(pump(source)) for source in sources]
    try:
        running = len(pumps)
        while running:
            item = await waiting.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)

"""Batch: the engine requests of one client request that pools, run side by side.

Knows engines through EngineClient. Does not know bodies or replies.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import aclosing

from octavo.cluster.ingress.client import EngineClient
from octavo.cluster.ingress.errors import Interrupted
from octavo.cluster.observability.metrics import IngressMetrics
from octavo.cluster.observability.traces import NO_JOURNEY, Journey, Trace
from octavo.engine.errors import CapacityError, RequestError, StepError
from octavo.engine.types import FinishReason, Request, TokenDelta

# Prompts that go to a replica together: the call costs more than a short text's computation does.
TOGETHER = 32
# Calls of one client request at a time; so it has a few steps' worth in the engines, and others find room beside it.
SIDE_BY_SIDE = 8
TRACED = 8  # calls of a request whose way is drawn; hundreds would bury the picture


class Batch:
    """`run` gives one vector per prompt. What else is here is for the access log and traces, final once it has ended.

    requests: each of some of the prompts, in their order. names: what errors call the prompts.
    """

    num_completion_tokens = 0
    ttft_s: float | None = None

    def __init__(
        self,
        client: EngineClient,
        metrics: IngressMetrics,
        requests: Sequence[Request],
        names: Sequence[str],
        arrival_time: float,
        trace: Trace,
    ) -> None:
        self.requests = requests
        self.num_prompt_tokens = sum(len(prompt) for request in requests for prompt in request.prompts)
        self.num_cached_tokens = 0
        self.finish_reasons: tuple[FinishReason | None, ...] = (None,)
        self._client, self._metrics, self._names = client, metrics, names
        self._arrival_time, self._trace = arrival_time, trace
        self._under_way = 0
        self._ended = asyncio.Event()

    async def run(self) -> list[bytes]:
        """float32 values, little-endian, of each prompt in order. The first that fails ends all."""
        places = asyncio.Semaphore(SIDE_BY_SIDE)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._in_place(places, number)) for number in range(len(self.requests))]
        except BaseExceptionGroup as errors:
            raise _first(errors) from None
        self.finish_reasons = ("stop",)
        return [vector for task in tasks for vector in task.result()]

    async def _in_place(self, places: asyncio.Semaphore, number: int) -> list[bytes]:
        request, reason = self.requests[number], "error"
        found: dict[int, bytes] = {}
        journey = self._trace.journey(number) if number < TRACED else NO_JOURNEY
        try:
            async with places:
                while not await self._is_taken(request, found, journey):
                    await self._another_ends()
            return [found[index] for index in range(len(request.prompts))]
        except RequestError as error:
            name = self._name(number)
            raise RequestError(f"{name}: {error.message}", name) from None
        except asyncio.CancelledError:
            reason = "abort"
            raise
        finally:
            journey.ended()
            for index, prompt in enumerate(request.prompts):
                if index not in found:
                    self._count(reason, prompt)

    async def _is_taken(self, request: Request, found: dict[int, bytes], journey: Journey) -> bool:
        """Pool it, into `found`. False: there is no room for it now, and what this batch has there will make some."""
        self._under_way += 1
        try:
            await self._pool(request, found, journey)
        except CapacityError:
            if self._under_way > 1:
                return False
            self._metrics.rejected("max_num_queued_reqs")
            raise
        finally:
            self._under_way -= 1
            self._ended.set()
        return True

    async def _another_ends(self) -> None:
        self._ended.clear()
        await self._ended.wait()

    async def _pool(self, request: Request, found: dict[int, bytes], journey: Journey) -> None:
        async with aclosing(self._client.generate(request, journey)) as deltas:
            async for delta in deltas:
                found[delta.index] = _vector(delta)
                self.num_cached_tokens += delta.num_cached_tokens
                self._count("stop", request.prompts[delta.index])
                if len(found) == len(request.prompts):
                    return
        raise Interrupted("The engine ended the request early; it may be tried again.")

    def _name(self, number: int) -> str:
        """What the prompts of a request are called."""
        names = self._names[number * TOGETHER : (number + 1) * TOGETHER]
        return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"

    def _count(self, reason: str, prompt: Sequence[int]) -> None:
        self._metrics.pooled(reason, len(prompt), time.monotonic() - self._arrival_time)


def _vector(delta: TokenDelta) -> bytes:
    if delta.pooled is not None:
        return delta.pooled
    if delta.finish_reason == "abort":
        raise Interrupted("The engine ended the request early; it may be tried again.")
    raise StepError(delta.error or "The engine failed on this request.")


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    found = errors.exceptions[0]
    return _first(found) if isinstance(found, BaseExceptionGroup) else found

"""EngineReplica: what a Serve replica runs. One engine, its loop's thread, and the channels its tokens leave by.

Knows the engine, the side channel and the control messages. Does not know HTTP, text, or which replica gets what.

A control call (`generate`) stays open until its request has ended, so Serve's counting of ongoing requests, its
back-pressure, draining and cancellation all hold for the request itself, and not only for its acceptance.

A replica that fails says so to all its requests at once; one that has to stop hands them over. Both end a request with
ReplicaLost, and what is left of it is submitted elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Protocol

from octavo.cluster import wire
from octavo.cluster.autoscaling import sample_of
from octavo.cluster.ingress.client import HandedOver, ReplicaLost
from octavo.cluster.progress import Progress, Supervisor
from octavo.cluster.publisher import Publisher
from octavo.cluster.token_sender import TokenChannel, TokenSender
from octavo.engine.core.blocks import BlockPool
from octavo.engine.errors import OctavoError, RankLost, StepError
from octavo.engine.params import SamplingParams
from octavo.engine.pooling.prompts import pooling_request
from octavo.engine.types import EngineInfo, EngineStats, RankStatus, Request, TokenDelta

logger = logging.getLogger(__name__)

# A replica hands over so long before Serve's patience ends (or after half of it, if that is later): time to close.
HAND_OVER_S = 2.0
FIRST_TOKEN = "first-token"  # the request by which a replica proves itself; clients' ids in the engine have dots


class EngineLoop(Protocol):
    """The part of `octavo.engine.loop.EngineLoop` that a replica uses. All of it may be called from any thread."""

    @property
    def failure(self) -> BaseException | None: ...
    @property
    def num_live(self) -> int: ...
    @property
    def pool(self) -> BlockPool: ...
    def start(self) -> None: ...
    def submit(self, request: Request) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def stats(self) -> EngineStats: ...
    def ranks(self) -> tuple[RankStatus, ...]: ...
    def stop(self, drain_s: float = 0.0) -> None: ...


OnDeltas = Callable[[list[TokenDelta]], None]


@dataclass(frozen=True, slots=True)
class Host:
    """What a replica asks of the process it lives in.

    is_draining: whether it is to stop; asked on a thread of its own. drain_timeout_s: how long after that it is killed.
    failed: told on that thread, once, why the replica cannot go on, after its requests were.
    """

    is_draining: Callable[[], bool] = lambda: False
    drain_timeout_s: float = 60.0
    failed: Callable[[BaseException], None] = lambda error: None


@dataclass(eq=False, slots=True)
class _Live:
    """A request in the engine. `ended` gets None once the last delta is written, or why the request is lost."""

    request_id: str  # the client's
    channel: TokenChannel
    stream_id: int
    unfinished: int  # sequences without a finish reason yet
    ended: asyncio.Future[None]


class EngineReplica:
    """`start` gets the callback for the engine's deltas and returns the loop that will call it on the engine's thread.

    All methods run on the event loop that constructs it.
    """

    def __init__(
        self,
        replica_id: str,
        info: EngineInfo,
        start: Callable[[OnDeltas], EngineLoop],
        step_timeout_s: float,
        host: Host | None = None,
    ) -> None:
        self._host = host or Host()
        self._replica_id = replica_id
        self._info = info
        self._aio = asyncio.get_running_loop()
        self._live: dict[str, _Live] = {}  # by the engine's id
        self._sender = TokenSender(replica_id, self._abort_all_of)
        self._progress = Progress(step_timeout_s)
        self._step_timeout_s = step_timeout_s
        self._hand_over_at: float | None = None
        self._has_handed_over = False
        self._first_token: asyncio.Future[TokenDelta] = self._aio.create_future()
        self._loop = start(self._on_deltas)
        self._publisher = Publisher(self._loop.pool, self._loop.stats)
        self._loop.start()
        self._supervisor = Supervisor(self._look, self._failed)
        self._supervisor.start()

    async def first_token(self) -> None:
        """Generate one token, or whatever the model is for: only then is a replica worth calling ready.

        Raises RankLost or StepError.
        """
        prompt, pooling = (self._info.vocab_size // 2,), self._info.pooling
        if pooling.generates:
            params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, seed=0)
            self._loop.submit(Request(FIRST_TOKEN, prompt, params))
        else:
            self._loop.submit(pooling_request(FIRST_TOKEN, [prompt], pooling.usual()))
        try:
            async with asyncio.timeout(self._step_timeout_s):
                delta = await self._first_token
        except TimeoutError:
            raise RankLost(f"The engine has not generated its first token in {self._step_timeout_s:g} s.") from None
        if delta.finish_reason != "length" and delta.pooled is None:
            raise StepError(f"The engine could not generate its first token: {delta.error}")

    async def generate(self, data: bytes, _call: None = None) -> bytes:
        """The control call: GenerateRequest → GenerateReply, once the request has ended. Cancelled, it aborts it.

        `_call`, here and elsewhere, is what the ingress told its router, of which nothing arrives (routing/router.py).
        """
        try:
            submission = wire.decode_submission(data, time.monotonic())
            await self._run(submission, await self._sender.channel(submission.ingress))
        except OctavoError as error:
            return wire.encode_reply(error)
        return wire.encode_reply(None)

    async def subscribe(self, data: bytes, _call: None = None) -> None:
        """An ingress (its address, encoded) wants to hear of load and blocks, beginning with all there is. Raises
        ReplicaLost if it cannot be reached.
        """
        self._publisher.subscribe(await self._sender.channel(wire.decode_ingress(data)))

    def info(self, _call: None = None) -> bytes:
        return bytes(wire.info_to_proto(self._info).SerializeToString())

    def stats(self) -> bytes:
        return wire.encode_stats(self._replica_id, self._loop.stats())

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve's controller is to know of the load: autoscaling_policy.METRICS."""
        said = asdict(sample_of(self._loop.stats(), self._info.block_size))
        del said["at"]  # Serve notes the time
        return said

    def status(self) -> bytes:
        """For `octavo status`: wire.ReplicaStatus."""
        ranks, stats = self._loop.ranks(), self._loop.stats()
        return wire.encode_status(wire.ReplicaStatus(self._info, stats, ranks, time.monotonic()))

    def abort(self, request_id: str) -> int:
        """End the client's request of this id; returns how many there were."""
        found = [engine_id for engine_id, live in self._live.items() if live.request_id == request_id]
        for engine_id in found:
            self._loop.abort(engine_id)
        return len(found)

    def check_health(self) -> None:
        """Raises RankLost if the engine has failed or stands still with work to do: the supervisor's word, at once."""
        if self._supervisor.failure is not None:
            raise RankLost(str(self._supervisor.failure))

    def hand_over(self) -> None:
        """End all requests here and refuse new ones: others go on with them."""
        if self._live:
            logger.info("%d requests are handed over", len(self._live))
        self._has_handed_over = True
        self._end_everything(HandedOver("The replica has to stop."))

    async def close(self) -> None:
        """Hand over what is left, close the channels. Serve has drained the replica by then."""
        self._supervisor.stop()
        await self._publisher.close()
        self.hand_over()
        await asyncio.to_thread(self._loop.stop)
        await asyncio.sleep(0)  # lets the last deltas, posted from the engine's thread, reach their channels
        await self._sender.close()

    async def _run(self, submission: wire.Submission, channel: TokenChannel) -> None:
        # The client's id may not be unique (it comes from a header); the engine's must be.
        request = submission.request
        if self._has_handed_over:
            raise HandedOver("The replica has to stop.")
        if channel.ended:
            raise ReplicaLost(f"The token channel to ingress {submission.ingress.id} broke.")
        engine_id = f"{request.request_id}.{submission.ingress.id}.{submission.stream_id}"
        unfinished = len(request.sequences)
        live = _Live(request.request_id, channel, submission.stream_id, unfinished, self._aio.create_future())
        self._live[engine_id] = live
        try:
            self._loop.submit(replace(request, request_id=engine_id))
            channel.accept(submission.stream_id)
            await live.ended
        finally:
            del self._live[engine_id]
            if live.unfinished:
                self._loop.abort(engine_id)

    def _on_deltas(self, deltas: list[TokenDelta]) -> None:
        """On the engine's thread, once per step."""
        stats = self._loop.stats()
        if not self._aio.is_closed():
            self._aio.call_soon_threadsafe(self._send, deltas, stats)

    def _send(self, deltas: Sequence[TokenDelta], stats: EngineStats) -> None:
        """One step's deltas: one batch per ingress. Those of requests that are gone are dropped."""
        batches: dict[TokenChannel, list[Any]] = defaultdict(list)
        finished: dict[TokenChannel, list[_Live]] = defaultdict(list)
        for delta in deltas:
            live = self._live.get(delta.request_id)
            if live is None:
                if delta.request_id == FIRST_TOKEN and not self._first_token.done():
                    self._first_token.set_result(delta)
                continue
            if self._loop.failure is not None and delta.finish_reason == "error":
                live.unfinished = 0
                _end(live, ReplicaLost(delta.error or "The engine has failed."))
                continue
            batches[live.channel].append(wire.delta_to_proto(delta, live.stream_id))
            live.unfinished -= delta.finish_reason is not None
            if not live.unfinished:
                finished[live.channel].append(live)
        self._publisher.gather()
        for channel, batch in batches.items():
            sent = channel.send(batch, stats)
            if channel in finished:
                sent.add_done_callback(partial(_end_all, finished[channel]))

    def _abort_all_of(self, ingress_id: str) -> None:
        """An ingress is gone, or the way to it: nobody is left to read what its requests would bring."""
        lost = [live for live in self._live.values() if live.channel.ingress.id == ingress_id]
        if lost:
            logger.warning("ingress %s is gone: its %d requests are aborted", ingress_id, len(lost))
        for live in lost:
            _end(live, ReplicaLost(f"The token channel to ingress {ingress_id} broke."))

    def _look(self, now: float) -> None:
        """On the supervisor's thread. Raises RankLost when the engine cannot go on."""
        if self._loop.failure is not None:
            raise RankLost(f"The engine has failed: {self._loop.failure}")
        self._progress.check(now, self._loop.stats().steps, self._loop.num_live > 0)
        if self._hand_over_at is None and self._host.is_draining():
            patience_s = self._host.drain_timeout_s
            self._hand_over_at = now + max(patience_s / 2, patience_s - HAND_OVER_S)
        if self._hand_over_at is not None and now >= self._hand_over_at and not self._has_handed_over:
            self._has_handed_over = True
            self._aio.call_soon_threadsafe(self.hand_over)

    def _failed(self, error: BaseException) -> None:
        """On the supervisor's thread."""
        if not self._aio.is_closed():
            self._aio.call_soon_threadsafe(self._end_everything, ReplicaLost(str(error)))
        self._host.failed(error)

    def _end_everything(self, error: ReplicaLost) -> None:
        for live in self._live.values():
            _end(live, type(error)(str(error)))


def _end_all(finished: Sequence[_Live], _sent: asyncio.Future[None]) -> None:
    for live in finished:
        _end(live)


def _end(live: _Live, error: ReplicaLost | None = None) -> None:
    if live.ended.done():
        return
    if error is None:
        live.ended.set_result(None)
    else:
        live.ended.set_exception(error)

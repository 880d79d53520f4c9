"""ServeEngineClient: EngineClient over a Serve deployment of engine replicas and the side channel.

Control goes through the deployment's handle (Serve picks the replica, counts the request, cancels it); tokens come in
through this ingress's TokenReceiver. Knows nothing of HTTP or text. A request here ends with its replica; that it goes
on elsewhere is the business of failover.py.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Any

from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from octavo.cluster import wire
from octavo.cluster.ingress.client import HandedOver, ReplicaLost
from octavo.cluster.routing.fleet import Fleet, Placing
from octavo.cluster.routing.policies import Prefix
from octavo.cluster.routing.pool import Pool
from octavo.cluster.token_receiver import Inbox, TokenReceiver
from octavo.engine.errors import CapacityError, OctavoError
from octavo.engine.types import EngineInfo, EngineStats, Request, TokenDelta
from octavo.protos.octavo.v1 import tokens_pb2

# The control call has said that all deltas are sent; how much later than that they may arrive.
LAST_DELTAS_S = 10.0
# A replica accepts as soon as it hears of a request. Ray can take much longer than we to believe that one is gone, so
# while a request is not accepted, it is looked so often whether its replica is still heard of.
LOOK_S = 0.5
MAX_INDEX_BLOCKS = 1 << 20
INFO_S = 5.0  # after which a replica is asked anew what it is
STATS_S = 2.0  # how long one replica's snapshot is waited for


class ServeEngineClient:
    """Lives on the event loop on which `receiver` was started. `fleet` decides where requests go, once `start` was
    called: by default whoever has the longest part of the prompt cached.
    """

    def __init__(self, handle: DeploymentHandle[Any], receiver: TokenReceiver, fleet: Fleet | None = None) -> None:
        self._handle = handle
        self._pool = Pool(handle, fleet or Fleet(Prefix(), MAX_INDEX_BLOCKS))
        self._receiver = receiver
        self._info: EngineInfo | None = None
        self._info_at = 0.0  # monotonic, when it was last asked for
        self._may_be_away = False
        self._watching: set[asyncio.Task[None]] = set()  # asyncio itself keeps only weak references

    def start(self, may_be_away: bool = False) -> None:
        """Hear of the replicas' load and blocks from now on; of a model that may be away, from the first request on."""
        self._may_be_away = may_be_away
        self._pool.start(self._receiver, may_be_away)

    async def close(self) -> None:
        await self._pool.close()

    async def info(self) -> EngineInfo:
        """Waits for the first replica to be up. Raises ReplicaLost if it goes away meanwhile.

        While a new version is rolled out, old and new engines run side by side: what was told is asked again now and
        then, without anybody waiting for it.
        """
        if self._info is None:
            return await self._ask_info()
        if time.monotonic() - self._info_at > INFO_S and not self._is_away:
            self._info_at = time.monotonic()
            self._keep(self._ask_info_again())
        return self._info

    @property
    def _is_away(self) -> bool:
        """Whether to ask the model anything would bring it back."""
        return self._may_be_away and not self._pool.fleet.replicas

    async def _ask_info(self) -> EngineInfo:
        try:
            data = await self._pool.call("info")
        except (RayError, RayServeException) as error:
            raise _translated(error) from error
        self._info, self._info_at = wire.info_from_proto(tokens_pb2.EngineInfo.FromString(data)), time.monotonic()
        return self._info

    async def _ask_info_again(self) -> None:
        with suppress(OctavoError):  # the old one is as good as any
            await self._ask_info()

    async def stats(self) -> Mapping[str, EngineStats]:
        """Asks every replica; those that do not answer are left out."""
        try:
            # results_async would wait for all, and a replica that hangs is one of them.
            asked: Sequence[Any] = await self._handle.broadcast("stats")._fetch_replica_results_async()
        except (RayError, RayServeException) as error:
            raise _translated(error) from error
        answers = (asyncio.wait_for(result.get_async(), STATS_S) for result in asked)
        found = await asyncio.gather(*answers, return_exceptions=True)
        return dict(wire.decode_stats(answer) for answer in found if isinstance(answer, bytes))

    async def generate(self, request: Request) -> AsyncGenerator[TokenDelta, None]:
        """See EngineClient. A ReplicaLost says that the request can be submitted again, prompt and tokens so far."""
        async with aclosing(self.attempt(request, lambda replica: None)) as deltas:
            async for delta in deltas:
                yield delta

    async def attempt(
        self,
        request: Request,
        accepted: Callable[[str], None],
        within_s: float | None = None,
        avoid: Collection[str] = (),
    ) -> AsyncGenerator[TokenDelta, None]:
        """`generate` that says which replica has the request: `accepted` gets its id before the first delta.

        `avoid`: replicas the request has just been lost with. Raises ReplicaLost too if none has accepted it `within_s`
        seconds from now.
        """
        placing = self._pool.placing(request, (await self.info()).block_size, avoid)
        inbox = self._receiver.open(request.request_id)
        submission = wire.Submission(request, self._receiver.address, inbox.stream_id)
        call = self._pool.call("generate", wire.encode_submission(submission), placing=placing)
        self._watch(call, inbox)
        unfinished = len(request.sequences)
        try:
            accepted(await self._acceptance(inbox, placing, within_s))
            while unfinished:
                delta = await inbox.mailbox.take()
                if placing.replica is not None:
                    self._pool.fleet.started(placing, delta.num_cached_tokens)
                unfinished -= delta.finish_reason is not None
                yield delta
        finally:
            self._pool.fleet.ended(placing)
            self._receiver.close(inbox)
            if unfinished:
                call.cancel()

    async def _acceptance(self, inbox: Inbox, placing: Placing, within_s: float | None) -> str:
        started = time.monotonic()
        waited, left_s = 0.0, math.inf if within_s is None else within_s
        while not await inbox.settled(min(LOOK_S, left_s - waited)):
            waited = time.monotonic() - started
            if waited >= left_s:
                raise ReplicaLost(f"No replica has taken the request for {waited:.1f} s.")
            if placing.replica is not None and self._pool.fleet.is_lost(placing.replica):
                raise ReplicaLost(f"Replica {placing.replica} is not heard of and has not taken the request.")
        if inbox.replica is None:
            await inbox.mailbox.take()  # raises what it failed with
        return inbox.replica or ""

    def _watch(self, call: Any, inbox: Inbox) -> None:
        self._keep(self._await_end(call, inbox))

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._watching.add(task)
        task.add_done_callback(self._watching.discard)

    async def _await_end(self, call: Any, inbox: Inbox) -> None:
        """Wait for the control call's end, and fail the inbox if that is not the end of all sequences."""
        error: OctavoError | None
        try:
            error = wire.decode_reply(await call)
        except asyncio.CancelledError:
            error = ReplicaLost("The request was cancelled.")
        except (RayError, RayServeException) as failure:
            error = _translated(failure)
        if isinstance(error, HandedOver) and inbox.replica is not None:
            self._receiver.leaving.add(inbox.replica)
        if error is not None:
            inbox.fail(error)
            return
        if inbox.is_open:  # the last deltas are on their way
            await asyncio.sleep(LAST_DELTAS_S)
            inbox.fail(ReplicaLost("The replica says that it sent all tokens, but they did not arrive."))


def _translated(error: Exception) -> OctavoError:
    """What Serve's exceptions mean here."""
    match error:
        case BackPressureError():
            return CapacityError("Too many requests are waiting for a replica.", retry_after_s=2)
        case RayTaskError():
            return OctavoError(f"The replica failed with a bug: {error.cause}")
        case RayActorError():
            return ReplicaLost("The replica that served the request died.")
        case _:
            return ReplicaLost(f"No replica can serve the request: {type(error).__name__}.")

"""ServeEngineClient: EngineClient over a Serve deployment of engine replicas and the side channel.

Control goes through the deployment's handle (Serve picks the replica, counts the request, cancels it); tokens come in
through this ingress's TokenReceiver. Knows nothing of HTTP or text.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from octavo.cluster import wire
from octavo.cluster.ingress.client import ReplicaLost
from octavo.cluster.token_receiver import Inbox, TokenReceiver
from octavo.engine.errors import CapacityError, OctavoError
from octavo.engine.types import EngineInfo, EngineStats, Request, TokenDelta
from octavo.protos.octavo.v1 import tokens_pb2

# The control call has said that all deltas are sent; how much later than that they may arrive.
LAST_DELTAS_S = 10.0


class ServeEngineClient:
    """Lives on the event loop on which `receiver` was started."""

    def __init__(self, handle: DeploymentHandle[Any], receiver: TokenReceiver) -> None:
        self._handle = handle
        self._receiver = receiver
        self._info: EngineInfo | None = None
        self._watching: set[asyncio.Task[None]] = set()  # asyncio itself keeps only weak references

    async def info(self) -> EngineInfo:
        """Waits for the first replica to be up. Raises ReplicaLost if it goes away meanwhile."""
        if self._info is None:
            try:
                data = await self._handle.info.remote()
            except (RayError, RayServeException) as error:
                raise _translated(error) from error
            self._info = wire.info_from_proto(tokens_pb2.EngineInfo.FromString(data))
        return self._info

    async def stats(self) -> list[EngineStats]:
        """Asks every replica. Raises ReplicaLost if one went away meanwhile."""
        try:
            found = await self._handle.broadcast("stats").results_async()
        except (RayError, RayServeException) as error:
            raise _translated(error) from error
        return [wire.stats_from_proto(tokens_pb2.EngineStats.FromString(data)) for data in found]

    async def generate(self, request: Request) -> AsyncGenerator[TokenDelta, None]:
        """See EngineClient. A ReplicaLost says that the request can be submitted again, prompt and tokens so far."""
        inbox = self._receiver.open(request.request_id)
        submission = wire.Submission(request, self._receiver.address, inbox.stream_id)
        call = self._handle.generate.remote(wire.encode_submission(submission))
        self._watch(call, inbox)
        unfinished = request.params.n
        try:
            while unfinished:
                delta = await inbox.mailbox.take()
                unfinished -= delta.finish_reason is not None
                yield delta
        finally:
            self._receiver.close(inbox)
            if unfinished:
                call.cancel()  # type: ignore[no-untyped-call]

    def _watch(self, call: Any, inbox: Inbox) -> None:
        watcher = asyncio.create_task(self._await_end(call, inbox))
        self._watching.add(watcher)
        watcher.add_done_callback(self._watching.discard)

    async def _await_end(self, call: Any, inbox: Inbox) -> None:
        """Wait for the control call's end, and fail the inbox if that is not the end of all sequences."""
        error: OctavoError | None
        try:
            error = wire.decode_reply(await call)
        except asyncio.CancelledError:
            error = ReplicaLost("The request was cancelled.")
        except (RayError, RayServeException) as failure:
            error = _translated(failure)
        if error is not None:
            inbox.mailbox.fail(error)
            return
        if inbox.is_open:  # the last deltas are on their way
            await asyncio.sleep(LAST_DELTAS_S)
            inbox.mailbox.fail(ReplicaLost("The replica says that it sent all tokens, but they did not arrive."))


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

"""Pool: the replicas of one model as an ingress reaches them: control calls through Serve's handle, routed by a Fleet.

Knows the handle, the Fleet and the Watch that informs it. Does not know tokens' way back. Lives on one event loop.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Collection
from itertools import chain
from typing import Any

from ray.serve.handle import DeploymentHandle

from octavo.cluster import wire
from octavo.cluster.routing.call import Call
from octavo.cluster.routing.fleet import Fleet, Placing
from octavo.cluster.routing.watch import Watch
from octavo.cluster.token_receiver import TokenReceiver
from octavo.engine.core.prefix import Chain
from octavo.engine.types import Request

logger = logging.getLogger(__name__)

RETRY_S = 1.0


class Pool:
    """`fleet` decides where requests go; it is kept informed from `start` on."""

    def __init__(self, handle: DeploymentHandle[Any], fleet: Fleet) -> None:
        self.fleet = fleet
        self._handle = handle
        self._watch: Watch | None = None
        self._introduction: asyncio.Task[None] | None = None

    def call(
        self,
        method: str,
        *arguments: Any,
        placing: Placing | None = None,
        only: str | None = None,
    ) -> Any:
        """A control call, and what its router is to know (see Call). Returns Serve's response.

        It is made outside of the HTTP request's context: Serve would give all calls of one HTTP request the same
        internal id, and its RequestRouter finds only one waiting call by an id: a second one would hang.
        """
        remote = getattr(self._handle, method).remote
        call = Call(self.fleet, placing, only, self._watch)
        return contextvars.Context().run(lambda: remote(*arguments, call))

    def placing(self, request: Request, block_size: int, avoid: Collection[str] = ()) -> Placing:
        """What the fleet is to know of a request. `avoid`: replicas that come last."""
        tokens = request.prompt_token_ids
        if request.resume:
            tokens = tuple(chain(tokens, request.resume[0].token_ids))
        blocks = Chain(tokens, block_size, request.cache_salt)
        num_tokens = len(tokens) + sum(map(len, request.more_prompts))
        return Placing(num_tokens, blocks, request.session_id, frozenset(avoid))

    def start(self, receiver: TokenReceiver, may_be_away: bool = False) -> None:
        """Subscribe with the replicas there are and those that come; they dial back to `receiver`, which is started.

        may_be_away: do so from the first request on. To ask for the model before would bring it here.
        """
        address = wire.encode_ingress(receiver.address)

        async def subscribe(replica: str) -> None:
            await self.call("subscribe", address, only=replica)

        self._watch = Watch(self.fleet, subscribe)
        receiver.listeners.append(self._watch)
        if not may_be_away:
            self._introduction = asyncio.create_task(self._introduce(), name="fleet-introduction")

    async def close(self) -> None:
        if self._introduction is not None:
            self._introduction.cancel()
            await asyncio.gather(self._introduction, return_exceptions=True)
        if self._watch is not None:
            await self._watch.close()

    async def _introduce(self) -> None:
        """The router lives in this process, but only calls reach it: they tell it who wants to know of the replicas."""
        while True:
            try:
                await self.call("info")
                return
            except Exception as error:
                logger.info("no replica has answered yet: %r", error)
                await asyncio.sleep(RETRY_S)

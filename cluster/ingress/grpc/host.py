"""RpcHost: the methods that Serve calls, by the names of the RPCs. For the class of the ingress deployment to inherit.

Serve finds a call's method by the last part of its path alone, and passes its context if there is a parameter for it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octavo.cluster.ingress.catalog import Catalog


class RpcHost:
    def start_rpc(self, catalog: Catalog, through_handle: Callable[[], bool], draining: Callable[[], bool]) -> None:
        """From now on calls are answered. To be called on the event loop they come on. See Calls and Health."""
        from octavo.cluster.ingress.grpc.health import Health
        from octavo.cluster.ingress.grpc.servicer import Servicer

        self._servicer = Servicer(catalog, through_handle)
        self._health = Health(catalog, draining)

    async def Generate(self, request: Any, grpc_context: Any) -> AsyncIterator[Any]:
        async for chunk in self._servicer.generate(request, grpc_context):
            yield chunk

    async def GenerateUnary(self, request: Any, grpc_context: Any) -> Any:
        return await self._servicer.generate_unary(request, grpc_context)

    async def Tokenize(self, request: Any, grpc_context: Any) -> Any:
        return await self._servicer.tokenize(request, grpc_context)

    async def ListModels(self, request: Any, grpc_context: Any) -> Any:
        return await self._servicer.list_models(request, grpc_context)

    async def Check(self, request: Any, grpc_context: Any) -> Any:
        return await self._health.check(request, grpc_context)

    async def List(self, request: Any, grpc_context: Any) -> Any:
        return await self._health.list(request, grpc_context)

    async def Watch(self, request: Any, grpc_context: Any) -> AsyncIterator[Any]:
        async for status in self._health.watch(request, grpc_context):
            yield status

"""grpc.health.v1: SERVING is what /ready answers 200 for. Needs no API key, as over HTTP.

Services: "" (all models), "octavo.v1.Inference" (the same), and each name of a model.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from grpc import StatusCode
from grpc_health.v1.health_pb2 import HealthCheckResponse, HealthListResponse

from octavo.cluster.ingress.catalog import Catalog
from octavo.cluster.ingress.client import ReplicaLost
from octavo.cluster.ingress.grpc.calls import Context
from octavo.cluster.ingress.grpc.servicer import SERVICE
from octavo.cluster.ingress.service import MAX_NAME_CHARS, Service

# How old an answer may be: however many ask, the engines are asked this often.
FRESH_S = 1.0
UNKNOWN, SERVING, NOT_SERVING = (
    HealthCheckResponse.SERVICE_UNKNOWN,
    HealthCheckResponse.SERVING,
    HealthCheckResponse.NOT_SERVING,
)


class Health:
    """`draining`: whether this ingress is to stop. Then nothing is served, and watches end, which would keep it."""

    def __init__(self, catalog: Catalog, draining: Callable[[], bool] = lambda: False) -> None:
        self._catalog = catalog
        self._draining = draining
        self._looks = {service.name: _Look(service) for service in catalog}

    async def check(self, request: Any, context: Context) -> Any:
        status = await self._status(request.service)
        if status == UNKNOWN:
            context.set_code(StatusCode.NOT_FOUND)
            context.set_details(f"There is no service {request.service[:MAX_NAME_CHARS]!r} here.")
        return HealthCheckResponse(status=status)

    async def list(self, request: Any, context: Context) -> Any:
        found = {name: await self._status(name) for name in ("", SERVICE, *self._catalog.names)}
        return HealthListResponse(statuses={name: HealthCheckResponse(status=status) for name, status in found.items()})

    async def watch(self, request: Any, context: Context) -> AsyncIterator[Any]:
        told = None
        while True:
            ends = self._draining()
            status = await self._status(request.service)
            if status != told:
                told = status
                yield HealthCheckResponse(status=status)
            if ends:
                return
            await asyncio.sleep(FRESH_S)

    async def _status(self, name: str) -> Any:
        services: Mapping[str, list[Service]] = {
            "": list(self._catalog),
            SERVICE: list(self._catalog),
            **{model: [service] for service in self._catalog for model in service.settings.served_model_names},
        }
        if name not in services:
            return UNKNOWN
        if self._draining():
            return NOT_SERVING
        ready = await asyncio.gather(*(self._looks[service.name].ready() for service in services[name]))
        return SERVING if all(ready) else NOT_SERVING


class _Look:
    """One model's readiness, asked for by many and looked up by one at a time."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._lock = asyncio.Lock()
        self._looked_at = -FRESH_S
        self._ready = False

    async def ready(self) -> bool:
        async with self._lock:
            if time.monotonic() - self._looked_at >= FRESH_S:
                try:
                    await self._service.check_ready()
                    self._ready = True
                except ReplicaLost:
                    self._ready = False
                self._looked_at = time.monotonic()
            return self._ready

"""Servicer: the methods of octavo.v1.Inference over the same Services that answer over HTTP."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from octavo.cluster.ingress.catalog import Catalog
from octavo.cluster.ingress.generation import Generation, Piece, join
from octavo.cluster.ingress.grpc.bodies import generation_body, tokenize_body
from octavo.cluster.ingress.grpc.calls import Calls, Context, Method
from octavo.cluster.ingress.grpc.chunks import Writer
from octavo.cluster.ingress.grpc.window import Parcel, Window
from octavo.cluster.ingress.keys import Keys
from octavo.cluster.ingress.protocol import ChatBody
from octavo.cluster.ingress.service import MAX_NAME_CHARS, Service
from octavo.cluster.ingress.visit import Visit
from octavo.engine.errors import RequestError
from octavo.protos.octavo.v1 import inference_pb2 as pb

SERVICE = "octavo.v1.Inference"
_GENERATE = Method(f"/{SERVICE}/Generate", pb.GenerationRequest, pb.GenerationChunk)
_GENERATE_UNARY = Method(f"/{SERVICE}/GenerateUnary", pb.GenerationRequest, pb.GenerationResponse)
_TOKENIZE = Method(f"/{SERVICE}/Tokenize", pb.TokenizeRequest, pb.TokenizeResponse)
_LIST_MODELS = Method(f"/{SERVICE}/ListModels", pb.ListModelsRequest, pb.ListModelsResponse)


class Servicer:
    """Lives on the catalog's event loop. Takes requests as bytes. `through_handle`: see Calls."""

    def __init__(self, catalog: Catalog, through_handle: Callable[[], bool] = lambda: False) -> None:
        settings = catalog.services[0].settings
        self._catalog = catalog
        self._calls = Calls(Keys(settings.api_keys), settings.max_body_bytes, through_handle)

    def generate(self, request: bytes, context: Context) -> AsyncGenerator[Parcel, None]:
        return self._calls.stream(_GENERATE, request, context, self._chunks)

    async def generate_unary(self, request: bytes, context: Context) -> Any:
        return await self._calls.unary(_GENERATE_UNARY, request, context, self._whole)

    async def tokenize(self, request: bytes, context: Context) -> Any:
        return await self._calls.unary(_TOKENIZE, request, context, self._tokenize)

    async def list_models(self, request: bytes, context: Context) -> Any:
        return await self._calls.unary(_LIST_MODELS, request, context, self._models)

    async def _chunks(self, request: Any, visit: Visit, window: Window) -> AsyncGenerator[Any, None]:
        service, generation, writer = await self._begin(request, visit)
        with service.places.taken(), visit.recorded(generation):
            async with visit.time_limit(service.settings.request_timeout_s), aclosing(generation.pieces()) as pieces:
                async for piece in pieces:
                    yield writer.chunk(piece)
                    await window.room()

    async def _whole(self, request: Any, visit: Visit) -> Any:
        service, generation, writer = await self._begin(request, visit)
        parts: list[list[Piece]] = [[] for _ in generation.choices]
        with service.places.taken(), visit.recorded(generation):
            async with visit.time_limit(service.settings.request_timeout_s), aclosing(generation.pieces()) as pieces:
                async for piece in pieces:
                    parts[piece.index].append(piece)
        return writer.whole([join(part) for part in parts])

    async def _begin(self, request: Any, visit: Visit) -> tuple[Service, Generation, Writer]:
        if request.HasField("session_id"):
            if not 0 < len(request.session_id) <= MAX_NAME_CHARS:
                raise RequestError(f"session_id must be a string of 1 to {MAX_NAME_CHARS} characters.", "session_id")
            visit.session_id = request.session_id
        service = self._catalog.find(request.model or None)
        body = generation_body(request)
        answer_id = f"gen-{body.request_id or visit.request_id}"
        if isinstance(body, ChatBody):
            generation = await service.chat(body, visit, answer_id)
        else:
            generation = await service.complete(body, visit, answer_id)
        return service, generation, Writer(request, generation, service.names, answer_id, service.name)

    async def _tokenize(self, request: Any, visit: Visit) -> Any:
        body = tokenize_body(request)
        found = await self._catalog.find(body.model).tokenize(body)
        return pb.TokenizeResponse(
            token_ids=found["tokens"], token_texts=found["token_strs"], max_model_len=found["max_model_len"]
        )

    async def _models(self, request: Any, visit: Visit) -> Any:
        entries = [await self._catalog.find(name).model(name) for name in self._catalog.names]
        return pb.ListModelsResponse(
            models=[
                pb.ListModelsResponse.Model(
                    name=entry["id"], root=entry["root"], max_model_len=entry["max_model_len"], created=entry["created"]
                )
                for entry in entries
            ]
        )

"""The HTTP application: paths, and what is put around them. Reads as a list.

`create_app` is all that others need. Knows engines only as an EngineClient: it runs under uvicorn, in a test without a
socket, or in a Serve deployment alike.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from octavo.cluster.ingress import endpoints, replies
from octavo.cluster.ingress.catalog import Catalog
from octavo.cluster.ingress.client import ReplicaLost
from octavo.cluster.ingress.errors import TimedOut, failure
from octavo.cluster.ingress.forms import in_form
from octavo.cluster.ingress.gate import OPEN_PATHS, Gate
from octavo.cluster.ingress.messages import endpoint as messages
from octavo.cluster.ingress.messages.body import CountTokensBody, MessagesBody
from octavo.cluster.ingress.openapi import describe
from octavo.cluster.ingress.pooling.paths import BODIES as POOLING_BODIES
from octavo.cluster.ingress.pooling.paths import add_pooling_paths
from octavo.cluster.ingress.prompts import check_ids
from octavo.cluster.ingress.protocol import (
    AnyBody,
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    body_of,
    parse,
)
from octavo.cluster.ingress.responses.body import InputBody, Page, ResponsesBody
from octavo.cluster.ingress.responses.endpoint import Responses
from octavo.cluster.ingress.service import Service
from octavo.cluster.ingress.visit import Visit
from octavo.cluster.observability.metrics import CONTENT_TYPE, IngressMetrics, exposition
from octavo.engine.errors import RequestError
from octavo.engine.types import EngineStats

BODIES: Mapping[str, type[Body]] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/v1/responses": ResponsesBody,
    "/v1/responses/input_tokens": InputBody,
    "/v1/messages": MessagesBody,
    "/v1/messages/count_tokens": CountTokensBody,
    **POOLING_BODIES,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}
BODY_S = 120.0  # how long a client may take to send its body
PARSE_IN_THREAD_BYTES = 1 << 17


def create_app(services: Sequence[Service]) -> FastAPI:
    """The ASGI application that serves the models of `services`, at least one; they agree in keys, origins and body
    size. Its Catalog is at `app.state.catalog`.
    """
    catalog, settings = Catalog(services), services[0].settings
    app = FastAPI(title="octavo", version=octavo_version(), redirect_slashes=False)
    app.state.catalog = catalog
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_middleware(Gate, api_keys=settings.api_keys, max_body_bytes=settings.max_body_bytes)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allowed_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "request-id"],
        )
    _generation_paths(app, catalog)
    _responses_paths(app, catalog, Responses(settings.max_stored_bytes))
    _messages_paths(app, catalog)
    add_pooling_paths(app, catalog, _read, _visit)
    _token_paths(app, catalog)
    _model_paths(app, catalog)
    _operator_paths(app, catalog)
    describe(app, BODIES, bool(settings.api_keys), OPEN_PATHS)
    return app


def _generation_paths(app: FastAPI, catalog: Catalog) -> None:
    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        """Continue a prompt (OpenAI's completions)."""
        body = await _read(CompletionBody, request)
        return await endpoints.complete(catalog.find(body.model), body, _visit(request))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation (OpenAI's chat completions)."""
        body = await _read(ChatBody, request)
        return await endpoints.chat(catalog.find(body.model), body, _visit(request))


def _responses_paths(app: FastAPI, catalog: Catalog, responses: Responses) -> None:
    @app.post("/v1/responses")
    async def create(request: Request) -> Response:
        """Answer input items (OpenAI's responses)."""
        body = await _read(ResponsesBody, request)
        return await responses.create(catalog.find(body.model), body, _visit(request))

    @app.post("/v1/responses/input_tokens")
    async def input_tokens(request: Request) -> Response:
        """How many tokens an input is."""
        body = await _read(InputBody, request)
        return _json(await responses.count(catalog.find(body.model), body))

    @app.get("/v1/responses/{response_id}")
    async def retrieve(request: Request, response_id: str) -> Response:
        """A response that is stored here."""
        if request.query_params.get("stream", "false") != "false":
            raise RequestError("A stored response cannot be streamed: stream must be left out.", "stream")
        return _json(responses.get(response_id))

    @app.delete("/v1/responses/{response_id}")
    async def delete(response_id: str) -> Response:
        return _json(responses.delete(response_id))

    @app.post("/v1/responses/{response_id}/cancel")
    async def cancel(response_id: str) -> Response:
        """Refused: no response is in the background."""
        responses.cancel(response_id)

    @app.get("/v1/responses/{response_id}/input_items")
    async def input_items(request: Request, response_id: str) -> Response:
        """What a stored response answers."""
        return _json(responses.inputs(response_id, body_of(Page, request.query_params)))


def _messages_paths(app: FastAPI, catalog: Catalog) -> None:
    @app.post("/v1/messages")
    async def create_message(request: Request) -> Response:
        """Answer a conversation (Anthropic's messages)."""
        body = await _read(MessagesBody, request)
        return await messages.create(catalog.find(body.model), body, _visit(request))

    @app.post("/v1/messages/count_tokens")
    async def count_tokens(request: Request) -> Response:
        """How many tokens a conversation is."""
        body = await _read(CountTokensBody, request)
        return _json(await messages.count_tokens(catalog.find(body.model), body))


def _token_paths(app: FastAPI, catalog: Catalog) -> None:
    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        """A text's tokens, or a conversation's as the model would get it."""
        body = await _read(TokenizeBody, request)
        service = catalog.find(body.model)
        service.check(body)
        return _json(await service.tokenize(body))

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        """The text of tokens."""
        body = await _read(DetokenizeBody, request)
        service = catalog.find(body.model)
        service.check(body)
        info = await service.info()
        check_ids(body.tokens, info.vocab_size, "tokens")
        text = await asyncio.to_thread(service.tokenizer.decode, tuple(body.tokens), skip_special_tokens=False)
        return _json({"prompt": text})


def _model_paths(app: FastAPI, catalog: Catalog) -> None:
    @app.get("/v1/models")
    async def models() -> Response:
        """The names under which models are served."""
        return _json({"object": "list", "data": [await catalog.find(name).model(name) for name in catalog.names]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return _json(await catalog.find(name).model(name))


def _operator_paths(app: FastAPI, catalog: Catalog) -> None:
    async def check() -> None:
        await asyncio.gather(*(service.stats() for service in catalog))

    @app.get("/health")
    async def health() -> Response:
        """200 while an engine of each model answers, else 503."""
        await check()
        return Response(status_code=200)

    @app.get("/ready")
    async def ready() -> Response:
        """200 while each model has a replica that is there and has generated a token, else 503."""
        await asyncio.gather(*(service.check_ready() for service in catalog))
        return Response(status_code=200)

    @app.get("/ping")
    @app.post("/ping")
    async def ping() -> Response:
        """The same, under the name SageMaker knows."""
        await check()
        return Response(status_code=200)

    @app.get("/version")
    async def show_version() -> Response:
        return _json({"version": octavo_version()})

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus metrics."""
        known = [service for service in catalog if not service.is_unknown]
        return Response(exposition(await asyncio.gather(*map(_counted, known))), media_type=CONTENT_TYPE)


async def _counted(service: Service) -> tuple[IngressMetrics, Mapping[str, EngineStats]]:
    try:
        engines = await service.stats()
    except ReplicaLost:
        engines = {}  # what the ingress has counted is worth showing in any case
    return await service.metrics(), engines


def octavo_version() -> str:
    try:
        return version("octavo")
    except PackageNotFoundError:  # run from a folder that was never installed
        return "unknown"


async def _read(kind: type[AnyBody], request: Request) -> AnyBody:
    try:
        async with asyncio.timeout(BODY_S):
            data = await request.body()
    except TimeoutError:
        raise TimedOut(f"The request body did not arrive within {BODY_S:g} s.") from None
    if len(data) > PARSE_IN_THREAD_BYTES:
        return await asyncio.to_thread(parse, kind, data)
    return parse(kind, data)


def _visit(request: Request) -> Visit:
    visit: Visit = request.scope["octavo.visit"]
    return visit


def _json(body: Mapping[str, Any]) -> Response:
    return Response(replies.to_json(body), media_type="application/json")


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    refused = in_form(failure(error), request.url.path, _visit(request))
    return Response(replies.to_json(refused.body), refused.status, dict(refused.headers), "application/json")

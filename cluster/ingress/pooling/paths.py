"""The paths of everything that is pooled."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

from fastapi import FastAPI, Request
from starlette.responses import Response

from octavo.cluster.ingress.catalog import Catalog
from octavo.cluster.ingress.pooling import endpoints
from octavo.cluster.ingress.pooling.bodies import (
    ClassifyBody,
    EmbeddingBody,
    PoolBody,
    PoolingBody,
    RerankBody,
    ScoreBody,
)
from octavo.cluster.ingress.service import Service
from octavo.cluster.ingress.visit import Visit

B = TypeVar("B", bound=PoolingBody)
Endpoint = Callable[[Service, B, Visit], Awaitable[Response]]

BODIES: Mapping[str, type[PoolingBody]] = {
    "/v1/embeddings": EmbeddingBody,
    "/pooling": PoolBody,
    "/classify": ClassifyBody,
    "/v1/classify": ClassifyBody,
    "/score": ScoreBody,
    "/v1/score": ScoreBody,
    "/rerank": RerankBody,
    "/v1/rerank": RerankBody,
    "/v2/rerank": RerankBody,
}


def add_pooling_paths(
    app: FastAPI, catalog: Catalog, read: Callable[..., Awaitable[PoolingBody]], visit_of: Callable[[Request], Visit]
) -> None:
    """read: (kind of body, request) → the body."""

    async def through(kind: type[B], request: Request, endpoint: Endpoint[B]) -> Response:
        body = await read(kind, request)
        assert isinstance(body, kind)
        return await endpoint(catalog.find(body.model), body, visit_of(request))

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        """Vectors of texts (OpenAI's embeddings)."""
        return await through(EmbeddingBody, request, endpoints.embed)

    @app.post("/pooling")
    async def pooling(request: Request) -> Response:
        """What the model makes of texts, whatever that is: vLLM's pooling."""
        return await through(PoolBody, request, endpoints.pool)

    @app.post("/classify")
    @app.post("/v1/classify")
    async def classify(request: Request) -> Response:
        """The model's classes of texts, with probabilities (vLLM's classify)."""
        return await through(ClassifyBody, request, endpoints.classify)

    @app.post("/score")
    @app.post("/v1/score")
    async def score(request: Request) -> Response:
        """How well texts fit one another (vLLM's score)."""
        return await through(ScoreBody, request, endpoints.score)

    @app.post("/rerank")
    @app.post("/v1/rerank")
    @app.post("/v2/rerank")
    async def rerank(request: Request) -> Response:
        """Documents in the order in which they fit a query (Jina's and Cohere's rerank)."""
        return await through(RerankBody, request, endpoints.rerank)

"""From a parsed body to the answer that will carry it out: what to pool, and what the vectors become."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from starlette.responses import Response

from octavo.cluster.ingress.pooling import shapes
from octavo.cluster.ingress.pooling.answer import PooledAnswer
from octavo.cluster.ingress.pooling.batch import TOGETHER, Batch
from octavo.cluster.ingress.pooling.bodies import (
    ClassifyBody,
    EmbeddingBody,
    PoolBody,
    PoolingBody,
    RerankBody,
    ScoreBody,
)
from octavo.cluster.ingress.pooling.inputs import Ids, check_count, fitted, input_ids, names_of
from octavo.cluster.ingress.service import Service
from octavo.cluster.ingress.visit import Visit
from octavo.cluster.observability.traces import Operation
from octavo.engine.errors import RequestError
from octavo.engine.pooling.outputs import cosine, floats, paired
from octavo.engine.pooling.params import PoolingParams
from octavo.engine.pooling.prompts import pooling_request, prompted
from octavo.engine.types import EngineInfo

Shape = Callable[[shapes.Head, Sequence[bytes]], dict[str, Any]]
ShapeOfScores = Callable[[shapes.Head, Sequence[float]], dict[str, Any]]


async def embed(service: Service, body: EmbeddingBody, visit: Visit) -> Response:
    call = await _Call.begin(service, body, visit, "embeddings", "embd")
    return await _embed(call, body, "embedding", "embedding")


async def pool(service: Service, body: PoolBody, visit: Visit) -> Response:
    call = await _Call.begin(service, body, visit, "pooling", "pool")
    task = body.task or ("classify" if call.info.pooling.classifies else "embed")
    if task == "embed":
        return await _embed(call, body, "pooling", "data")
    if task != "classify":
        raise RequestError(
            f"task must be embed or classify, got {task!r}: vectors of single tokens are not made.", "task"
        )
    for name in ("dimensions", "normalize", "prompt_name"):
        if getattr(body, name) is not None:
            raise RequestError(f"{name} is for embeddings, not for classes.", name)
    params = call.resolve(PoolingParams(task="classify", use_activation=body.use_activation))
    ids = await input_ids(service, body, call.info)
    form = body.encoding_format or "float"
    return await call.answer(
        ids, _input_names(body, ids), params, lambda head, found: shapes.vectors(head, "pooling", "data", found, form)
    )


async def classify(service: Service, body: ClassifyBody, visit: Visit) -> Response:
    call = await _Call.begin(service, body, visit, "classify", "classify")
    params = call.resolve(PoolingParams(task="classify", use_activation=body.use_activation))
    ids = await input_ids(service, body, call.info)
    labels = call.info.pooling.labels
    return await call.answer(
        ids, _input_names(body, ids), params, lambda head, found: shapes.classes(head, labels, found)
    )


async def score(service: Service, body: ScoreBody, visit: Visit) -> Response:
    call = await _Call.begin(service, body, visit, "score", "score")
    (first_name, first), (second_name, second) = _sides(body)
    try:
        places = paired(len(first), len(second))
    except ValueError as error:
        raise RequestError(f"{error}.", first_name) from None
    sides = _Sides((first_name, first), (second_name, second), places)
    return await _score(call, body, sides, shapes.scores)


async def rerank(service: Service, body: RerankBody, visit: Visit) -> Response:
    call = await _Call.begin(service, body, visit, "rerank", "rerank")
    top_n = body.top_n or None  # 0, in vLLM, is all
    if top_n is not None and top_n < 0:
        raise RequestError(f"top_n must be at least 1, got {top_n}.", "top_n")
    documents = None if body.return_documents is False else body.documents
    sides = _Sides(("query", (body.query,)), ("documents", body.documents), [0] * len(body.documents))
    return await _score(call, body, sides, lambda head, found: shapes.ranking(head, found, documents, top_n))


class _Call:
    """One request of this kind, admitted."""

    def __init__(self, service: Service, body: PoolingBody, visit: Visit, info: EngineInfo, prefix: str) -> None:
        self.service, self.body, self.visit, self.info = service, body, visit, info
        self.answer_id = f"{prefix}-{body.request_id or visit.request_id}"

    @classmethod
    async def begin(cls, service: Service, body: PoolingBody, visit: Visit, operation: Operation, prefix: str) -> _Call:
        service.trace(visit, operation, body.model)
        return cls(service, body, visit, await service.admit(body), prefix)

    def resolve(self, params: PoolingParams) -> PoolingParams:
        return self.info.pooling.resolve(params)

    async def answer(
        self, prompts: Sequence[Ids], names: Sequence[str], params: PoolingParams, shape: Shape
    ) -> Response:
        service, visit = self.service, self.visit
        requests = [
            pooling_request(
                # Clients may repeat their ids; the engine's must be unique.
                f"{self.answer_id}-{first}-{secrets.token_hex(4)}",
                prompts[first : first + TOGETHER],
                params,
                priority=self.body.priority or 0,
                cache_salt=self.body.cache_salt,
                arrival_time=visit.arrival_time,
                session_id=visit.session_id
                or self.body.session_id
                or visit.headers.get(service.settings.session_header),
            )
            for first in range(0, len(prompts), TOGETHER)
        ]
        batch = Batch(service.client, await service.metrics(), requests, names, visit.arrival_time, visit.trace)
        head = shapes.Head(self.answer_id, service.name, int(time.time()), batch.num_prompt_tokens)
        return PooledAnswer(batch, partial(shape, head), visit, service.places, service.settings.request_timeout_s)


class _Sides:
    """Texts to be scored: places[i] is the first text that second text i belongs to."""

    def __init__(
        self, first: tuple[str, tuple[str, ...]], second: tuple[str, tuple[str, ...]], places: Sequence[int]
    ) -> None:
        (self.first_name, self.first), (self.second_name, self.second), self.places = first, second, places


async def _embed(call: _Call, body: EmbeddingBody, kind: str, key: str) -> Response:
    params = call.resolve(
        PoolingParams(normalize=body.normalize, use_activation=body.use_activation, dimensions=body.dimensions)
    )
    ids = await input_ids(call.service, body, call.info, prompted(call.info.pooling, body.prompt_name))
    form = body.encoding_format or "float"
    return await call.answer(
        ids, _input_names(body, ids), params, lambda head, found: shapes.vectors(head, kind, key, found, form)
    )


async def _score(call: _Call, body: PoolingBody, sides: _Sides, shape: ShapeOfScores) -> Response:
    """Pairs through a cross-encoder, else the cosines of embeddings."""
    pooling = call.info.pooling
    check_count(call.service, len(sides.first) + len(sides.second), sides.second_name)
    second_names = names_of(sides.second_name, len(sides.second))
    if pooling.scores_pairs:
        params = call.resolve(PoolingParams(task="classify", use_activation=body.use_activation))
        pairs = [(sides.first[place], text) for place, text in zip(sides.places, sides.second, strict=True)]
        ids = await fitted(call.service, body, call.info, pairs, second_names)
        return await call.answer(
            ids, second_names, params, lambda head, found: shape(head, [floats(each)[0] for each in found])
        )
    if not pooling.embeds:
        raise RequestError(f"This model tells {len(pooling.labels)} classes apart: it cannot score texts.", "model")
    names = [*names_of(sides.first_name, len(sides.first)), *second_names]
    texts = [*sides.first, *sides.second]
    ids = await fitted(call.service, body, call.info, texts, names, before=prompted(pooling, None))

    def cosines(found: Sequence[bytes]) -> list[float]:
        vectors = [floats(each) for each in found]
        others = vectors[len(sides.first) :]
        return [cosine(vectors[place], other) for place, other in zip(sides.places, others, strict=True)]

    params = call.resolve(PoolingParams())
    return await call.answer(ids, names, params, lambda head, found: shape(head, cosines(found)))


def _sides(body: ScoreBody) -> tuple[tuple[str, tuple[str, ...]], tuple[str, tuple[str, ...]]]:
    for names in (("text_1", "text_2"), ("data_1", "data_2"), ("queries", "documents"), ("queries", "items")):
        first, second = (getattr(body, name) for name in names)
        if first is not None and second is not None:
            return (names[0], first), (names[1], second)
    raise RequestError("text_1 and text_2 are required.", "text_2" if body.text_1 else "text_1")


def _input_names(body: ClassifyBody | EmbeddingBody, ids: Sequence[Ids]) -> list[str]:
    return ["messages"] if body.input is None else names_of("input", len(ids))

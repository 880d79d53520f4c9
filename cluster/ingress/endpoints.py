"""The paths that generate: from a parsed body to the response that will carry it out."""

from __future__ import annotations

import time

from starlette.responses import Response

from octavo.cluster.ingress.answers import Dialect, StreamedAnswer, WholeAnswer
from octavo.cluster.ingress.chat_completions import ChatDialect
from octavo.cluster.ingress.completions import CompletionDialect
from octavo.cluster.ingress.generation import Generation
from octavo.cluster.ingress.protocol import ChatBody, CompletionBody
from octavo.cluster.ingress.service import Service
from octavo.cluster.ingress.visit import Visit


async def complete(service: Service, body: CompletionBody, visit: Visit) -> Response:
    answer_id = f"cmpl-{body.request_id or visit.request_id}"
    generation = await service.complete(body, visit, answer_id)
    shows_prompts = body.echo or body.return_prompt_text
    texts = [await service.text(prompt) for prompt in generation.prompts] if shows_prompts else []
    dialect = CompletionDialect(
        body, generation, texts, service.names, answer_id=answer_id, model=service.name, created=int(time.time())
    )
    return answer(service, body.stream, generation, dialect, visit)


async def chat(service: Service, body: ChatBody, visit: Visit) -> Response:
    answer_id = f"chatcmpl-{body.request_id or visit.request_id}"
    generation = await service.chat(body, visit, answer_id)
    dialect = ChatDialect(
        body,
        generation,
        service.names,
        answer_id=answer_id,
        model=service.name,
        created=int(time.time()),
        prompt_text=await service.text(generation.prompts[0]) if body.return_prompt_text else None,
    )
    return answer(service, body.stream, generation, dialect, visit)


def answer(service: Service, stream: bool | None, generation: Generation, dialect: Dialect, visit: Visit) -> Response:
    """The response that carries the generation out when it is sent."""
    settings = service.settings
    if not stream:
        return WholeAnswer(generation, dialect, visit, service.places, settings.request_timeout_s)
    return StreamedAnswer(
        generation,
        dialect,
        visit,
        service.places,
        settings.request_timeout_s,
        early_errors_s=settings.early_errors_s,
    )

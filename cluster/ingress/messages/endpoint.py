"""The paths of /v1/messages: from a body to a reply."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from octavo.cluster.ingress.endpoints import answer
from octavo.cluster.ingress.messages.body import CountTokensBody, MessagesBody
from octavo.cluster.ingress.messages.convert import WORDS, chat_body
from octavo.cluster.ingress.messages.dialect import MessagesDialect
from octavo.cluster.ingress.service import Service
from octavo.cluster.ingress.vendors import in_words
from octavo.cluster.ingress.visit import Visit


async def create(service: Service, body: MessagesBody, visit: Visit) -> Response:
    service.check(body)
    answer_id = f"msg_{visit.request_id}"
    with in_words(WORDS):
        generation = await service.chat(chat_body(body), visit, answer_id)
    dialect = MessagesDialect(body, generation, answer_id=answer_id, model=service.name, request_id=visit.request_id)
    return answer(service, body.stream, generation, dialect, visit)


async def count_tokens(service: Service, body: CountTokensBody) -> dict[str, Any]:
    service.check(body)
    with in_words(WORDS):
        return {"input_tokens": await service.num_prompt_tokens(chat_body(body))}

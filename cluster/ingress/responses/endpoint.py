"""The paths of /v1/responses: from a body, and what is stored here, to a reply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from starlette.responses import Response

from octavo.cluster.ingress.endpoints import answer
from octavo.cluster.ingress.protocol import ChatBody
from octavo.cluster.ingress.responses.body import InputBody, ItemReference, Page, ResponsesBody
from octavo.cluster.ingress.responses.convert import WORDS, chat_body, read_item, stored_item
from octavo.cluster.ingress.responses.dialect import ResponsesDialect
from octavo.cluster.ingress.responses.output import new_id
from octavo.cluster.ingress.responses.store import ResponseStore, Stored, StoredItem
from octavo.cluster.ingress.responses.truncation import within_context
from octavo.cluster.ingress.service import MAX_NAME_CHARS, Service
from octavo.cluster.ingress.vendors import in_words
from octavo.cluster.ingress.visit import Visit
from octavo.engine.errors import NotFoundError, RequestError

_MISSING = "it was not stored, or by another ingress, or has had to make room since"


class Responses:
    """One per ingress, for all its models. What it stores takes at most `max_stored_bytes`."""

    def __init__(self, max_stored_bytes: int) -> None:
        self._store = ResponseStore(max_stored_bytes)

    async def create(self, service: Service, body: ResponsesBody, visit: Visit) -> Response:
        service.check(body)
        previous, inputs = self._said(body)
        answer_id = new_id("resp")
        with in_words(WORDS):
            chat = await _chat(service, body, previous, inputs)
            generation = await service.chat(chat, visit, answer_id)

        def keep(reply: dict[str, Any]) -> None:
            if body.is_stored:
                self._store.keep(Stored.of(reply, inputs, previous))

        dialect = ResponsesDialect(body, generation, service.names, answer_id=answer_id, model=service.name, keep=keep)
        return answer(service, body.stream, generation, dialect, visit)

    async def count(self, service: Service, body: InputBody) -> dict[str, Any]:
        """How many tokens the input is."""
        service.check(body)
        with in_words(WORDS):
            chat = await _chat(service, body, *self._said(body))
            return {"object": "response.input_tokens", "input_tokens": await service.num_prompt_tokens(chat)}

    def get(self, response_id: str) -> dict[str, Any]:
        return self._find(response_id).reply

    def delete(self, response_id: str) -> dict[str, Any]:
        self._find(response_id)
        self._store.drop(response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    def cancel(self, response_id: str) -> NoReturn:
        """Always refused: a response is cancelled by closing its connection."""
        self._find(response_id)
        raise RequestError(
            "Only a response in the background could be cancelled, and none is: close the connection instead."
        )

    def inputs(self, response_id: str, page: Page) -> dict[str, Any]:
        """A page of what a response answers: its own input and what had been said before."""
        stored = self._find(response_id)
        items = [*stored.past, *stored.inputs]
        if page.order == "desc":
            items.reverse()
        if page.after is not None:
            ids = [item["id"] for item in items]
            if page.after not in ids:
                raise RequestError(f"after is {page.after[:MAX_NAME_CHARS]!r}, which is no item's id.", "after")
            items = items[ids.index(page.after) + 1 :]
        shown = items[: page.limit]
        ends = {"first_id": shown[0]["id"] if shown else None, "last_id": shown[-1]["id"] if shown else None}
        return {"object": "list", "data": shown, **ends, "has_more": len(items) > len(shown)}

    def _said(self, body: InputBody) -> tuple[Stored | None, tuple[StoredItem, ...]]:
        """The response that the body goes on from, and the items of its input as they would be stored."""
        previous = None
        if body.previous_response_id is not None:
            previous = self._store.find(body.previous_response_id)
            if previous is None:
                raise RequestError(
                    f"Previous response with id {body.previous_response_id[:MAX_NAME_CHARS]!r} not found: {_MISSING}.",
                    "previous_response_id",
                )
        if isinstance(body.input, str):
            return previous, (stored_item({"role": "user", "content": body.input}),)
        return previous, tuple(self._item(item, f"input[{number}]") for number, item in enumerate(body.input or ()))

    def _item(self, value: StoredItem, place: str) -> StoredItem:
        item = read_item(value, place)
        if not isinstance(item, ItemReference):
            return stored_item(value)
        found = self._store.item(item.id)
        if found is None:
            raise RequestError(f"Item with id {item.id[:MAX_NAME_CHARS]!r} not found: {_MISSING}.", f"{place}.id")
        return found

    def _find(self, response_id: str) -> Stored:
        stored = self._store.find(response_id)
        if stored is None:
            raise NotFoundError(
                f"Response with id {response_id[:MAX_NAME_CHARS]!r} not found: {_MISSING}.", "response_id"
            )
        return stored


async def _chat(service: Service, body: InputBody, previous: Stored | None, inputs: Sequence[StoredItem]) -> ChatBody:
    past = previous.conversation if previous else ()
    items = [read_item(item, f"input[{number - len(past)}]") for number, item in enumerate((*past, *inputs))]
    chat = chat_body(body, items, num_past=len(past))
    return await within_context(service, chat) if body.truncation == "auto" else chat

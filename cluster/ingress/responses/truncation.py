"""truncation "auto": a conversation that is too long for the context loses its beginning, as few turns as it takes."""

from __future__ import annotations

from octavo.cluster.ingress.protocol import ChatBody
from octavo.cluster.ingress.service import Service


async def within_context(service: Service, body: ChatBody) -> ChatBody:
    """The body without its first turns, so that the prompt leaves room for an answer: max_completion_tokens, at most
    half of the context; a quarter where none is said. What begins the conversation as instructions stays, and so does
    the last turn, whether it fits or not. A turn begins with what the user says.
    """
    context = (await service.info()).max_model_len
    room = context - min(body.max_completion_tokens or context // 4, context // 2)
    if await service.num_prompt_tokens(body) <= room:
        return body
    head = 1 if body.messages[0].role == "system" else 0
    turns = [number for number, message in enumerate(body.messages) if message.role == "user" and number > head]

    def since(turn: int) -> ChatBody:
        return body.model_copy(update={"messages": [*body.messages[:head], *body.messages[turns[turn] :]]})

    low, high = 0, len(turns) - 1  # the first turn to keep is one of these
    while low < high:
        middle = (low + high) // 2
        if await service.num_prompt_tokens(since(middle)) <= room:
            high = middle
        else:
            low = middle + 1
    return since(low) if turns else body

"""From a body to token ids: inputs as texts or tokens, conversations, pairs of texts. Each is named for errors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from octavo.cluster.ingress.pooling.bodies import InputBody, PoolingBody
from octavo.cluster.ingress.protocol import TokenizeBody
from octavo.cluster.ingress.service import Service
from octavo.engine.errors import RequestError
from octavo.engine.pooling.prompts import Fitting, Input, PromptFitter
from octavo.engine.types import EngineInfo

Ids = tuple[int, ...]


async def input_ids(service: Service, body: InputBody, info: EngineInfo, before: str = "") -> list[Ids]:
    """Of every input. before: what is put before each that is a text."""
    if (body.input is None) == (body.messages is None):
        raise RequestError("Either input or messages must be given.", "input")
    if body.input is None:
        return await fitted(service, body, info, [await _rendered(service, body)], ["messages"], special=False)
    check_count(service, len(body.input), "input")
    names = names_of("input", len(body.input))
    return await fitted(service, body, info, body.input, names, before=before)


async def fitted(
    service: Service,
    body: PoolingBody,
    info: EngineInfo,
    inputs: Sequence[Input],
    names: Sequence[str],
    *,
    before: str = "",
    special: bool = True,
) -> list[Ids]:
    """Token ids of inputs; names are what errors call them. Raises RequestError."""
    wanted = body.add_special_tokens if isinstance(body, InputBody) else None
    fitting = Fitting(
        keep=body.truncate_prompt_tokens,
        side=body.truncation_side or "right",
        special=special if wanted is None else wanted,
        most=service.settings.max_prompt_tokens,
    )
    fitter = PromptFitter(service.tokenizer, info, fitting)
    return await _beside(service, inputs, lambda: fitter.of_inputs(inputs, names, before))


def names_of(field: str, count: int) -> list[str]:
    return [field] if count == 1 else [f"{field}[{number}]" for number in range(count)]


def check_count(service: Service, count: int, param: str) -> None:
    if count > service.settings.max_choices:
        raise RequestError(f"{param} has {count} entries; at most {service.settings.max_choices} are allowed.", param)


async def _rendered(service: Service, body: InputBody) -> str:
    template = TokenizeBody.model_construct(
        messages=body.messages,
        add_generation_prompt=bool(body.add_generation_prompt),
        continue_final_message=body.continue_final_message,
        chat_template=body.chat_template,
        chat_template_kwargs=body.chat_template_kwargs,
    )
    return await service.prompts.render(template)


async def _beside(service: Service, inputs: Sequence[Input], work: Callable[[], list[Ids]]) -> list[Ids]:
    """On a thread, if it takes so long that others would have to wait."""
    chars = sum(len(each) if isinstance(each, str) else sum(map(len, _parts(each))) for each in inputs)
    return work() if chars <= service.settings.tokenize_in_thread_chars else await asyncio.to_thread(work)


def _parts(each: Input) -> Sequence[str]:
    return [part for part in each if isinstance(part, str)]

"""From what a request says to the tokens of its prompts: templates, tokenization, truncation, limits on length."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from octavo.cluster.ingress.protocol import CompletionBody, GenerationBody, Message, TemplateFields, TokenizeBody
from octavo.cluster.ingress.settings import IngressSettings
from octavo.cluster.ingress.tool_prompt import ToolPrompt
from octavo.cluster.ingress.tools import earlier_calls, tools_of
from octavo.engine.errors import RequestError
from octavo.engine.text.tokenizer import Tokenizer

T = TypeVar("T")
_REASONING = frozenset({"reasoning_content", "reasoning", "thinking"})
# What a chat template gets from elsewhere; a request must not slip it in through chat_template_kwargs.
RESERVED_KWARGS = frozenset(
    {
        "add_generation_prompt",
        "arguments_as_text",
        "chat_template",
        "content_format",
        "continue_final_message",
        "conversation",
        "documents",
        "messages",
        "padding",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tools",
        "truncation",
    }
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """`text` is None for a prompt that came as tokens."""

    token_ids: tuple[int, ...]
    text: str | None


class PromptMaker:
    """Makes prompts for one model. Raises RequestError for what cannot become one."""

    def __init__(self, settings: IngressSettings, tokenizer: Tokenizer, tool_prompt: ToolPrompt) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self._tool_prompt = tool_prompt

    async def of_completion(self, body: CompletionBody, context: int, vocab_size: int) -> list[Prompt]:
        special = body.add_special_tokens is not False
        prompts = []
        for prompt in body.prompt:
            if isinstance(prompt, str):
                made = Prompt(tuple(await self.encode(prompt, special)), prompt)
            else:
                check_ids(prompt, vocab_size, "prompt")
                made = Prompt(prompt, None)
            prompts.append(self._fit(made, body, context, "prompt"))
        return prompts

    async def of_chat(self, body: GenerationBody, template: TemplateFields, context: int) -> Prompt:
        text = await self.render(template)
        ids = await self.encode(text, bool(template.add_special_tokens))
        return self._fit(Prompt(tuple(ids), text), body, context, "messages")

    async def render(self, body: TemplateFields | TokenizeBody) -> str:
        """The conversation as the model's chat template writes it."""
        settings = self._settings
        messages = check_messages(body.messages or [])
        if body.chat_template is not None and not settings.trust_request_chat_template:
            raise RequestError(
                "This server does not take chat templates from requests (trust_request_chat_template is off).",
                "chat_template",
            )
        tools = tools_of(body)
        kwargs = body.chat_template_kwargs or {}
        if taken := sorted(RESERVED_KWARGS & kwargs.keys()):
            raise RequestError(f"chat_template_kwargs must not contain {taken[0]!r}.", "chat_template_kwargs")
        continued = bool(body.continue_final_message)
        opened = body.add_generation_prompt
        if continued and opened:
            raise RequestError(
                "continue_final_message and add_generation_prompt exclude each other.", "continue_final_message"
            )
        if body.documents is not None:
            kwargs = {**kwargs, "documents": body.documents}
        if body.reasoning_effort is not None:
            thinks = body.reasoning_effort != "none"
            kwargs = {
                "reasoning_effort": body.reasoning_effort,
                "enable_thinking": thinks,
                "thinking": thinks,
                **kwargs,
            }
        template = body.chat_template or settings.chat_template

        def write() -> str:
            prepared = self._tool_prompt.prepare(messages, tools, template)
            return self._tokenizer.apply_chat_template(
                prepared.messages,
                tools=prepared.tools,
                arguments_as_text=prepared.arguments_as_text,
                chat_template=template,
                add_generation_prompt=not continued if opened is None else opened,
                continue_final_message=continued,
                **kwargs,
            )

        return await self._beside(sum(len(message.text) for message in body.messages or []), write)

    async def encode(self, text: str, add_special_tokens: bool) -> Sequence[int]:
        return await self._beside(
            len(text), lambda: self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        )

    async def _beside(self, size: int, work: Callable[[], T]) -> T:
        """Do `work` here if it is small, else on a thread, so that nobody's stream waits for it."""
        if size <= self._settings.tokenize_in_thread_chars:
            return work()
        return await asyncio.to_thread(work)

    def _fit(self, prompt: Prompt, body: GenerationBody, context: int, param: str) -> Prompt:
        ids = prompt.token_ids
        limit = min(context - 1, self._settings.max_prompt_tokens or context)
        keep = body.truncate_prompt_tokens
        if keep is not None:
            if keep < -1 or keep == 0 or keep > limit:
                raise RequestError(
                    f"truncate_prompt_tokens must be -1 or an integer between 1 and {limit}, got {keep}.",
                    "truncate_prompt_tokens",
                )
            keep = limit if keep == -1 else keep
            if len(ids) > keep:
                ids = ids[:keep] if body.truncation_side == "right" else ids[-keep:]
                prompt = Prompt(ids, None)
        if not ids:
            raise RequestError("The prompt is empty: it has no tokens.", param)
        if len(ids) >= context:
            raise RequestError(
                f"The prompt is {len(ids)} tokens long, but the model's context is {context} tokens and must hold the "
                f"answer too.",
                param,
            )
        if len(ids) > limit:
            raise RequestError(
                f"The prompt is {len(ids)} tokens long, but this server takes prompts of at most {limit} tokens.", param
            )
        return prompt


def check_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    for token in ids:
        if not 0 <= token < vocab_size:
            raise RequestError(f"{param}: token id {token} is not in [0, {vocab_size}).", param)


def check_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as chat templates take them."""
    if not messages:
        raise RequestError("messages must not be empty.", "messages")
    result = []
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
        extra = {name: value for name, value in (message.model_extra or {}).items() if value is not None}
        if extra.pop("audio", None):
            raise RequestError(f"{place}.audio is not supported yet: it must be left out.", f"{place}.audio")
        if calls := earlier_calls(extra, place):
            extra["tool_calls"] = calls
        if message.content is None and not (message.role == "assistant" and (calls or _REASONING & extra.keys())):
            raise RequestError(f"{place}.content is required.", f"{place}.content")
        role = "tool" if message.role == "function" else message.role
        result.append({**extra, "role": role, "content": message.content})
    return result

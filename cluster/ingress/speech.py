"""Speech: how one model thinks and calls tools, and what follows for a request: what reads its answers, and which form
their text must have so that calls are what they should be.

Parsers are the configured ones, else those that the chat template shows beyond doubt.
"""

from __future__ import annotations

import logging

from octavo.cluster.ingress.prompts import Prompt
from octavo.cluster.ingress.protocol import ChatBody
from octavo.cluster.ingress.reading.calls import OneCall
from octavo.cluster.ingress.reading.formats import (
    HERMES,
    JSON_LIST,
    NO_CALLS,
    CallFormat,
    call_format,
    guess_thinking,
    thinking,
)
from octavo.cluster.ingress.reading.parts import PlainReader, Reader
from octavo.cluster.ingress.reading.reading import Reading
from octavo.cluster.ingress.reading.thinking import Thinking, ThinkingReader, ThoughtCounter
from octavo.cluster.ingress.settings import IngressSettings
from octavo.cluster.ingress.tool_grammar import form_of_calls
from octavo.cluster.ingress.tool_prompt import ToolPrompt
from octavo.cluster.ingress.tools import Tools
from octavo.engine.errors import RequestError
from octavo.engine.grammar.spec import StructuredOutputs
from octavo.engine.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_TAIL_TOKENS = 16  # of a prompt without text, enough to hold the marks of a thought


class Speech:
    """Of one model. Raises ConfigError for parsers that do not exist."""

    def __init__(self, settings: IngressSettings, tokenizer: Tokenizer) -> None:
        template = settings.chat_template or tokenizer.chat_template or ""
        self._tokenizer = tokenizer
        self._configured = call_format(settings.tool_call_parser) if settings.tool_call_parser else None
        named = settings.reasoning_parser
        self._thinking = thinking(named) if named else guess_thinking(template)
        self.tool_prompt = ToolPrompt(tokenizer, self._configured)
        self._reads_auto = settings.enable_auto_tool_choice
        self._default_template = settings.chat_template
        self._has_warned = False

    def reading(self, body: ChatBody, tools: Tools | None, prompt: Prompt) -> Reading:
        """How to read the answers to `prompt`."""
        thought = self._thinking if self._may_think(body, prompt) else None
        is_open = thought is not None and self._is_open(thought, body, prompt)
        marks = [*self._notation(tools).markers] if tools is not None else []
        counters: list[ThoughtCounter] = []
        if thought is not None:
            marks += [thought.begin, thought.end]
        readers = []
        for _ in range(body.n or 1):
            reader = self._call_reader(tools)
            if thought is not None:
                shown = body.include_reasoning is not False
                reader = ThinkingReader(thought, reader, is_open=is_open, shown=shown)
                counters.append(
                    ThoughtCounter(self._one_token(thought.begin), self._one_token(thought.end), is_open=is_open)
                )
            readers.append(reader)
        ids = (self.special_id(mark) for mark in marks)
        return Reading(tuple(readers), tuple(counters), frozenset(token for token in ids if token is not None))

    def form(
        self, body: ChatBody, tools: Tools | None, prompt: Prompt, asked: StructuredOutputs | None
    ) -> StructuredOutputs | None:
        """The form of the outputs: what the client asked for, and what makes calls certain. It begins after thoughts.

        Raises RequestError for a form of the answer together with calls that must be made.
        """
        form = asked
        if tools is not None:
            if tools.must_call and asked is not None:
                raise RequestError(
                    "tool_choice asks for a call, so the answer cannot have a form of its own: leave out one of them.",
                    "tool_choice",
                )
            form = form_of_calls(tools, self._notation(tools), self.special_id, asked)
        if form is None or self._thinking is None or not self._may_think(body, prompt):
            return form
        return form.replace(begins_after=tuple(self._tokenizer.encode(self._thinking.end, add_special_tokens=False)))

    def special_id(self, text: str) -> int | None:
        """The special token that `text` is; None if it is none."""
        token = self._one_token(text)
        return token if token is not None and self._tokenizer.is_special(token) else None

    # ---- calls

    def _call_reader(self, tools: Tools | None) -> Reader:
        if tools is None or not (tools.must_call or self._reads_auto):
            return PlainReader()
        reader = self._notation(tools).reader(tools.offer)
        return reader if tools.parallel else OneCall(reader)

    def _notation(self, tools: Tools) -> CallFormat:
        """In which the model will write its calls."""
        own = self._own_notation()
        if tools.must_call and (own is None or own.shape is None):
            return JSON_LIST  # enforced, so any will do
        if own is None:
            self._warn()
        return own or NO_CALLS

    def _own_notation(self) -> CallFormat | None:
        skills = self.tool_prompt.skills(self._default_template)
        own = self._configured or skills.notation
        if skills.tools:
            return own
        # What we describe to the model, for its template does not.
        return own if own is not None and own.shape is not None else HERMES

    def _warn(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            logger.warning("how the model writes tool calls is not known, so they stay text: set tool_call_parser")

    # ---- thoughts

    def _may_think(self, body: ChatBody, prompt: Prompt) -> bool:
        if self._thinking is None:
            return False
        if body.continue_final_message:
            return self._thinking.end not in body.messages[-1].text
        return not self._thinking.is_over_after(self._tail(prompt))

    def _is_open(self, thought: Thinking, body: ChatBody, prompt: Prompt) -> bool:
        if body.continue_final_message:
            return thought.begin in body.messages[-1].text
        return thought.is_open_after(self._tail(prompt))

    def _tail(self, prompt: Prompt) -> str:
        if prompt.text is not None:
            return prompt.text[-256:]
        return self._tokenizer.decode(prompt.token_ids[-_TAIL_TOKENS:], skip_special_tokens=False)

    def _one_token(self, text: str) -> int | None:
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        return ids[0] if len(ids) == 1 else None

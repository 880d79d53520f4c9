"""Whether the form that a request asks for can be used: found here, where a fault can still be a 400 that says where.

Compiles away from the event loop, for a tokenizer of single bytes: for the text of a form that makes no difference.
Only grammars may name special tokens, and need the model's own. The engine compiles again, for itself.
"""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import Future
from typing import Any

from octavo.cluster.ingress.protocol import ChatBody, GenerationBody
from octavo.cluster.ingress.structured import name_of_form, structured_of
from octavo.cluster.ingress.tools import tools_of
from octavo.engine.errors import RequestError
from octavo.engine.grammar.grammars import CompiledGrammars
from octavo.engine.grammar.spec import StructuredOutputs
from octavo.engine.text.byte_tokenizer import ByteTokenizer
from octavo.engine.text.tokenizer import Tokenizer

CHECK_S = 20.0
_NEED_TOKENS = ("grammar", "structural_tag")


class FormChecks:
    """Lives on one event loop. Remembers forms that it has seen."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bytes = CompiledGrammars(ByteTokenizer, ByteTokenizer.vocab_size, ByteTokenizer.eos_token_ids)
        self._tokens = CompiledGrammars(lambda: tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids)

    async def check(self, body: GenerationBody, form: StructuredOutputs) -> None:
        """Raises RequestError, naming the field of the body that `form` comes from."""
        try:
            await self._compile(form)
        except RequestError as error:
            asked = structured_of(body)
            if asked is not None and asked == form.replace(begins_after=asked.begins_after):
                raise _renamed(error, form, name_of_form(body, form)) from None
            if isinstance(body, ChatBody):
                await self._check_tools(body)
            raise _renamed(error, form, "tools") from None

    async def _check_tools(self, body: ChatBody) -> None:
        """The same of each tool's parameters, of which the form was made."""
        tools = tools_of(body)
        for tool in tools.tools if tools is not None else ():
            schema = StructuredOutputs(json=json.dumps(tool.schema, ensure_ascii=False))
            try:
                await self._compile(schema)
            except RequestError as error:
                raise _renamed(error, schema, f"{tool.place}.parameters") from None

    async def _compile(self, form: StructuredOutputs) -> None:
        grammars = self._tokens if form.kind in _NEED_TOKENS else self._bytes
        compiled: Future[Any] = grammars.compile(form)
        if compiled.done():
            compiled.result()
            return
        try:
            # Others may wait for the same: it goes on when this client leaves.
            await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(compiled)), CHECK_S)
        except TimeoutError:
            name = f"structured_outputs.{form.kind}"
            raise RequestError(f"{name} cannot be used: it takes longer than {CHECK_S:g} s to compile.", name) from None


def _renamed(error: RequestError, form: StructuredOutputs, name: str) -> RequestError:
    return RequestError(error.message.replace(f"structured_outputs.{form.kind}", name, 1), name)

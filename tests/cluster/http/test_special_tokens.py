"""Notations whose marks are special tokens: readers see the marks, clients see neither them nor the end token."""

import contextlib
import dataclasses
from collections.abc import AsyncGenerator

import httpx
import openai
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from octavo.cluster.ingress.app import create_app
from octavo.cluster.ingress.service import Service
from octavo.cluster.ingress.settings import IngressSettings
from octavo.cluster.observability.traces import NO_JOURNEY
from octavo.engine.text.chat import ChatTemplates
from octavo.engine.text.fast_tokenizer import FastTokenizer
from octavo.engine.types import TokenDelta

MARKS = ["</s>", "[TOOL_CALLS]", "[ARGS]", "[OTHER]", "<think>", "</think>"]
TEMPLATE = (
    "{{ tools | tojson if tools }}{% for m in messages %}{{ m.content }}{% for call in m.tool_calls or [] %}"
    "[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}{% endfor %}{% endfor %}"
)
TOOLS = [{"type": "function", "function": {"name": "now"}}]
REPLY = 'Wait[OTHER].[TOOL_CALLS]now[ARGS]{"a": "ö"}</s>'


def byte_level() -> FastTokenizer:
    """Every byte a token, and special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({char: number for number, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
    return FastTokenizer(backend, ChatTemplates({"default": TEMPLATE}, {"eos_token": "</s>"}))


class Engine:
    """Says `reply`, whose last token ends it."""

    def __init__(self, info, tokenizer, reply):
        self.ids = tuple(tokenizer.encode(reply, add_special_tokens=False))
        self.value = dataclasses.replace(info, vocab_size=tokenizer.vocab_size, eos_token_ids=tokenizer.eos_token_ids)
        self.seen = []

    async def info(self):
        return self.value

    async def stats(self):
        return {}

    async def generate(self, request, journey=NO_JOURNEY) -> AsyncGenerator[TokenDelta, None]:
        self.seen.append(request)
        for number, token in enumerate(self.ids, 1):
            yield TokenDelta(request.request_id, 0, (token,), (), "stop" if number == len(self.ids) else None)


@contextlib.asynccontextmanager
async def api(harness, reply, **settings):
    tokenizer = byte_level()
    engine = Engine(harness.info, tokenizer, reply)
    service = Service(IngressSettings(("m",), **settings), engine, tokenizer)
    transport = httpx.ASGITransport(create_app([service]), raise_app_exceptions=True)
    async with httpx.AsyncClient(transport=transport, base_url="http://octavo") as http:
        yield openai.AsyncOpenAI(base_url="http://octavo/v1", api_key="x", http_client=http, max_retries=0), engine


async def create(client, **body):
    ask = [{"role": "user", "content": "What time is it?"}]
    return await client.chat.completions.create(**{"model": "m", "messages": ask, **body})


@pytest.mark.parametrize("stop", [None, "never"])
async def test_marks_are_read_and_not_shown(harness, stop):
    async with api(harness, REPLY) as (client, _):
        whole = (await create(client, tools=TOOLS, stop=stop)).choices[0]
        chunks = [chunk.choices[0].delta async for chunk in await create(client, tools=TOOLS, stop=stop, stream=True)]
        without = (await create(client, stop=stop)).choices[0].message.content
        shown = (await create(client, stop=stop, extra_body={"skip_special_tokens": False})).choices[0].message.content
    (call,) = whole.message.tool_calls
    assert (call.function.name, call.function.arguments, len(call.id)) == ("now", '{"a": "ö"}', 9)
    assert (whole.message.content, whole.finish_reason) == ("Wait.", "tool_calls")
    assert "".join(delta.content or "" for delta in chunks) == "Wait."
    assert without == 'Wait.now{"a": "ö"}'
    assert shown == REPLY.removesuffix("</s>")


async def test_the_end_token_stays_hidden_where_stop_strings_are_shown(harness):
    async with api(harness, REPLY.replace("</s>", "") + "}</s>") as (client, _):
        message = (
            (await create(client, tools=TOOLS, extra_body={"include_stop_str_in_output": True})).choices[0].message
        )
    assert message.content == "Wait.}"


async def test_thoughts_between_special_tokens(harness):
    settings = {"chat_template": TEMPLATE + "<think>"}
    async with api(harness, "Hm.</think>\nNoon.</s>", **settings) as (client, engine):
        answer = await create(client, response_format={"type": "json_object"})
    message = answer.choices[0].message
    assert (message.reasoning_content, message.content) == ("Hm.", "Noon.")
    assert answer.usage.completion_tokens_details.reasoning_tokens == len("Hm.")
    assert answer.usage.completion_tokens == len("Hm.\nNoon.") + 2
    end = byte_level().encode("</think>", add_special_tokens=False)
    assert list(engine.seen[0].params.structured_outputs.begins_after) == end
    assert len(end) == 1


async def test_enforced_calls_name_special_tokens_by_their_ids(harness):
    async with api(harness, "[TOOL_CALLS][{}]</s>") as (client, engine):
        await create(client, tools=TOOLS, tool_choice="required")
    (mark,) = byte_level().encode("[TOOL_CALLS]", add_special_tokens=False)
    assert f'<[{mark}]> "["' in engine.seen[0].params.structured_outputs.grammar

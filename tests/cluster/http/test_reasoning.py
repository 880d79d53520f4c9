"""Reasoning over HTTP: split from the answer, whole and streamed, with and without thinking, beside forms and calls."""

import contextlib
import dataclasses
import json

import openai
import pytest

from octavo.engine.text.byte_tokenizer import ByteTokenizer

ASK = [{"role": "user", "content": "2 + 2?"}]
THOUGHT = "<think>\nTwo and two.\n</think>\n\n4"
# Qwen3's way, in short.
QWEN = """
{%- for tool in tools or [] %}{{ tool | tojson }}{% endfor %}
{%- for message in messages %}<|{{ message.role }}|>{{ message.content }}
    {%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}
{%- endfor %}
{{- '(' ~ reasoning_effort ~ ')' if reasoning_effort }}
{%- if add_generation_prompt %}<|assistant|>
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""
OPENS = "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}<|assistant|><think>\n"


@contextlib.asynccontextmanager
async def api(harness, *replies, template=QWEN, step=3, **settings):
    info = dataclasses.replace(harness.info, max_model_len=4096)
    engine = harness.Client(replies=replies, step=step, info_value=info)
    async with harness.http(engine, chat_template=template, **settings) as http:
        yield openai.AsyncOpenAI(base_url="http://octavo/v1", api_key="x", http_client=http, max_retries=0), engine


async def create(client, **body):
    return await client.chat.completions.create(**{"model": "scripted", "messages": ASK, **body})


def prompt_of(engine):
    return ByteTokenizer().decode(engine.seen[-1].prompt_token_ids, skip_special_tokens=False)


def split(message):
    return getattr(message, "reasoning_content", None), message.content


@pytest.mark.parametrize("step", [1, 5, 100])
async def test_whole_and_streamed(harness, step):
    async with api(harness, THOUGHT, "4", step=step) as (client, _):
        whole = await create(client, n=2)
        chunks = [chunk async for chunk in await create(client, n=2, stream=True)]
    assert [split(choice.message) for choice in whole.choices] == [("Two and two.", "4"), (None, "4")]
    assert whole.choices[0].message.reasoning == "Two and two."
    for index, expected in enumerate([("Two and two.", "4"), ("", "4")]):
        deltas = [c.delta for chunk in chunks for c in chunk.choices if c.index == index]
        thoughts = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
        assert (thoughts, "".join(delta.content or "" for delta in deltas)) == expected


async def test_hidden(harness):
    async with api(harness, THOUGHT) as (client, _):
        message = (await create(client, extra_body={"include_reasoning": False})).choices[0].message
    assert split(message) == (None, "4")


async def test_thinking_turned_off(harness):
    async with api(harness, "4 </think>") as (client, engine):
        for how in ({"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}):
            message = (await create(client, extra_body=how)).choices[0].message
            assert split(message) == (None, "4 </think>")
            assert "<|assistant|><think>\n\n</think>\n\n" in prompt_of(engine)


async def test_effort_is_the_templates_business(harness):
    async with api(harness, THOUGHT) as (client, engine):
        await create(client, reasoning_effort="high")
        assert prompt_of(engine).endswith("(high)<|assistant|>")
        await create(client, reasoning_effort="low", extra_body={"chat_template_kwargs": {"enable_thinking": False}})
        assert "</think>" in prompt_of(engine)


async def test_a_prompt_that_opens_the_thought_and_a_parser_by_name(harness):
    reply = "Two and two.\n</think>\n4"
    async with api(harness, reply, template=OPENS) as (client, _):
        assert split((await create(client)).choices[0].message) == ("Two and two.", "4")
    plain = OPENS.replace("<think>\n", "")
    async with api(harness, reply, template=plain) as (client, _):
        assert split((await create(client)).choices[0].message) == (None, reply)
    async with api(harness, reply, template=plain, reasoning_parser="deepseek_r1") as (client, _):
        assert split((await create(client)).choices[0].message) == ("Two and two.", "4")


async def test_a_turn_that_is_continued(harness):
    ask = {"extra_body": {"continue_final_message": True, "add_generation_prompt": False}}
    async with api(harness, "two.</think>4") as (client, _):
        for begun, expected in (("<think>Two and ", ("two.", "4")), ("<think>x</think>", (None, "two.</think>4"))):
            messages = [*ASK, {"role": "assistant", "content": begun}]
            assert split((await create(client, messages=messages, **ask)).choices[0].message) == expected


async def test_forms_and_enforced_calls_begin_after_the_thought(harness):
    end = tuple(b"</think>")
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
    tools = [{"type": "function", "function": {"name": "f"}}]
    call = '<think>Hm.</think>\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    async with api(harness, call) as (client, engine):
        await create(client, response_format=form)
        await create(client, response_format=form, reasoning_effort="none")
        choice = (await create(client, tools=tools, tool_choice="required")).choices[0]
    thinking, not_thinking, required = [request.params.structured_outputs for request in engine.seen]
    assert (thinking.begins_after, not_thinking.begins_after, required.begins_after) == (end, (), end)
    assert thinking.json == json.dumps({"type": "object"})
    assert split(choice.message) == ("Hm.", None)
    assert choice.message.tool_calls[0].function.name == "f"


async def test_thoughts_of_earlier_turns_reach_the_template(harness):
    template = QWEN.replace("{{ message.content }}", "[{{ message.reasoning_content }}]{{ message.content }}")
    async with api(harness, THOUGHT, template=template) as (client, engine):
        message = (await create(client)).choices[0].message
        await create(client, messages=[*ASK, message, *ASK])
    assert "<|assistant|>[Two and two.]4<|user|>" in prompt_of(engine)

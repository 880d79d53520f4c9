"""Calls that must be made, by an engine whose model draws at random: whatever it draws, they are calls.

Through HTTP, the official client, the grammar compiler and the engine.
"""

import contextlib
import json

import openai
import pytest
from jsonschema import validate

from octavo.cluster.ingress.client import LocalEngineClient
from octavo.engine.build import build_engine
from octavo.engine.config import EngineConfig
from octavo.engine.loop import EngineLoop

SCHEMAS = {
    "paint": {
        "type": "object",
        "properties": {"color": {"enum": ["red", "grün"]}, "coats": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["color", "coats"],
        "additionalProperties": False,
    },
    "stop": {"type": "object", "properties": {"now": {"type": "boolean"}}, "additionalProperties": False},
}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()]
ASK = [{"role": "user", "content": "Go."}]


@contextlib.asynccontextmanager
async def api(harness, **settings):
    engine, loops = build_engine(EngineConfig(model="fake", max_num_seqs=16)), []

    def start(on_deltas):
        loops.append(EngineLoop(engine.core, on_deltas))
        loops[0].start()
        return loops[0]

    try:
        async with harness.http(
            LocalEngineClient(engine.info, start), served_model_names=("fake",), **settings
        ) as http:
            yield openai.AsyncOpenAI(base_url="http://octavo/v1", api_key="x", http_client=http, max_retries=0)
    finally:
        loops[0].stop()


def create(client, **body):
    return client.chat.completions.create(
        **{"model": "fake", "messages": ASK, "tools": TOOLS, "temperature": 1.0, **body}
    )


@pytest.mark.parametrize("parser", ["hermes", "llama3_json", "mistral", "deepseek_v3", "pythonic"])
async def test_any_draw_is_a_call(harness, parser):
    async with api(harness, tool_call_parser=parser) as client:
        answer = await create(client, tool_choice="required", parallel_tool_calls=False, n=8, seed=1)
        named = {"type": "function", "function": {"name": "paint"}}
        one = await create(client, tool_choice=named, seed=2)
    for choice in answer.choices:
        assert choice.finish_reason == "tool_calls"
        (call,) = choice.message.tool_calls
        validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
    assert {choice.message.tool_calls[0].function.name for choice in answer.choices} == {"paint", "stop"}
    (call,) = one.choices[0].message.tool_calls
    assert (call.function.name, one.choices[0].finish_reason) == ("paint", "stop")


async def test_streamed_calls(harness):
    async with api(harness) as client:
        whole = await create(client, tool_choice="required", parallel_tool_calls=False, seed=5)
        stream = client.chat.completions.stream(
            model="fake",
            messages=ASK,
            tools=TOOLS,
            temperature=1.0,
            tool_choice="required",
            parallel_tool_calls=False,
            seed=5,
        )
        async with stream as events:
            final = await events.get_final_completion()
    (wanted,), (call,) = whole.choices[0].message.tool_calls, final.choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == (wanted.function.name, wanted.function.arguments)


async def test_a_schema_that_cannot_be_enforced_is_refused_by_name(harness):
    bad = {"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}}
    tools = [TOOLS[0], {"type": "function", "function": {"name": "f", "parameters": bad}}]
    async with api(harness) as client:
        with pytest.raises(openai.BadRequestError) as refused:
            await create(client, tools=tools, tool_choice="required")
        assert refused.value.param == "tools[1].function.parameters"
        await create(client, tools=tools, max_tokens=3)

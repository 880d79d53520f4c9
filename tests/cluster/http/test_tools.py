"""Tools over HTTP, as the official client offers them and reads their calls."""

import contextlib
import dataclasses
import json
import logging

import openai
import pytest
from pydantic import BaseModel

from octavo.engine.text.byte_tokenizer import ByteTokenizer

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "How it is.", "parameters": CITY}}
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS = [WEATHER, NOW]
ASK = [{"role": "user", "content": "How is it in Köln?"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
TWO = f'{CALL}\n<tool_call>\n{{"name": "now", "arguments": {{}}}}\n</tool_call>'

# Qwen's way, in short, and how it writes CALL.
TEMPLATE = """
{%- if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}
{%- for message in messages %}
    {%- if message.role == "tool" %}<|tool|>{{ message.content }}
    {%- else %}<|{{ message.role }}|>{{ message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson + '}</tool_call>' }}
        {%- endfor %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""

WRITTEN = '<tool_call>{"name": "weather", "arguments": {"city": "Köln"}}</tool_call>'


@contextlib.asynccontextmanager
async def api(harness, *replies, template=TEMPLATE, step=3, **settings):
    """The official client over the application in this process, and the engine behind it."""
    info = dataclasses.replace(harness.info, max_model_len=8192)
    engine = harness.Client(replies=replies or ("Hello",), step=step, info_value=info)
    async with harness.http(engine, chat_template=template, **settings) as http:
        yield openai.AsyncOpenAI(base_url="http://octavo/v1", api_key="x", http_client=http, max_retries=0), engine


def prompt_of(engine):
    return ByteTokenizer().decode(engine.seen[-1].prompt_token_ids, skip_special_tokens=False)


async def create(client, **body):
    return await client.chat.completions.create(**{"model": "scripted", "messages": ASK, **body})


def called(message):
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or []]


async def test_calls_and_text(harness):
    async with api(harness, "Let me look.\n" + TWO, TWO, "Hello") as (client, engine):
        answer = await create(client, tools=TOOLS, n=3)
        both, calls, text = answer.choices
    assert (both.message.content, both.finish_reason) == ("Let me look.", "tool_calls")
    assert called(both.message) == called(calls.message) == [("weather", {"city": "Köln"}), ("now", {})]
    assert calls.message.content is None
    assert (text.message.content, text.message.tool_calls, text.finish_reason) == ("Hello", None, "stop")
    ids = [call.id for choice in (both, calls) for call in choice.message.tool_calls]
    assert len(set(ids)) == 4
    assert '"name": "weather", "parameters": ' + json.dumps(CITY) in prompt_of(engine)
    assert engine.seen[0].params.structured_outputs is None


@pytest.mark.parametrize("step", [1, 7, 1000])
async def test_the_clients_own_stream_helper_puts_the_same_together(harness, step):
    async with (
        api(harness, "Let me look.\n" + TWO, step=step) as (client, _),
        client.chat.completions.stream(model="scripted", messages=ASK, tools=TOOLS) as stream,
    ):
        events = [event async for event in stream]
        final = (await stream.get_final_completion()).choices[0]
    assert (final.message.content, final.finish_reason) == ("Let me look.", "tool_calls")
    assert called(final.message) == [("weather", {"city": "Köln"}), ("now", {})]
    done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert [(event.name, event.index) for event in done] == [("weather", 0), ("now", 1)]
    if step == 1:
        deltas = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
        assert len(deltas) > len('{"city": "Köln"}')


async def test_pydantic_tools(harness):
    class Weather(BaseModel):
        """How it is."""

        city: str

    tool = openai.pydantic_function_tool(Weather, name="weather")
    async with api(harness, CALL) as (client, engine):
        answer = await client.chat.completions.parse(model="scripted", messages=ASK, tools=[tool])
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.parsed_arguments == Weather(city="Köln")
    # such tools are strict: text stays free, calls do not
    assert '"additionalProperties": false' in engine.seen[0].params.structured_outputs.grammar


async def test_results_go_back_to_the_model(harness):
    async with api(harness, CALL) as (client, engine):
        message = (await create(client, tools=TOOLS)).choices[0].message
        call_id = message.tool_calls[0].id
        result = {"role": "tool", "tool_call_id": call_id, "content": [{"type": "text", "text": "Rain"}]}
        await create(client, messages=[*ASK, message, result], tools=TOOLS)
    assert f"<|assistant|>{WRITTEN}<|tool|>Rain<|assistant|>" in prompt_of(engine)


async def test_none_offers_nothing_and_reads_nothing(harness):
    async with api(harness, CALL) as (client, engine):
        message = (await create(client, tools=TOOLS, tool_choice="none")).choices[0].message
    assert (message.content, message.tool_calls) == (CALL, None)
    assert "weather" not in prompt_of(engine)


async def test_one_call_at_a_time(harness):
    async with api(harness, TWO) as (client, _):
        message = (await create(client, tools=TOOLS, parallel_tool_calls=False)).choices[0].message
    assert called(message) == [("weather", {"city": "Köln"})]


async def test_required_and_named_calls_are_enforced(harness):
    named = {"type": "function", "function": {"name": "weather"}}
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named]}}
    async with api(harness, CALL) as (client, engine):
        for choice, reason in (("required", "tool_calls"), (named, "stop"), (allowed, "tool_calls")):
            answer = (await create(client, tools=TOOLS, tool_choice=choice)).choices[0]
            assert (called(answer.message), answer.finish_reason) == ([("weather", {"city": "Köln"})], reason)
    required, one, some = [request.params.structured_outputs.grammar for request in engine.seen]
    assert "weather" in required
    assert "now" in required
    assert "now" not in one + some


async def test_enforced_calls_where_the_notation_is_unknown_are_a_list(harness):
    unknown = TEMPLATE.replace("<tool_call>", "[[call]]")
    reply = '[{"name": "weather", "parameters": {"city": "Köln"}}]'
    async with api(harness, reply, template=unknown) as (client, engine):
        message = (await create(client, tools=TOOLS, tool_choice="required")).choices[0].message
        text = (await create(client, tools=TOOLS)).choices[0].message
    assert called(message) == [("weather", {"city": "Köln"})]
    assert text.content == reply
    assert engine.seen[1].params.structured_outputs is None


async def test_a_template_without_tools_gets_them_described(harness, caplog):
    system = [{"role": "system", "content": "Be brief."}, *ASK]
    with caplog.at_level(logging.WARNING):
        async with api(harness, CALL, template=None) as (client, engine):
            for _ in range(2):
                message = (await create(client, messages=system, tools=TOOLS)).choices[0].message
            first = prompt_of(engine)
            call_id = message.tool_calls[0].id
            results = [{"role": "tool", "tool_call_id": call_id, "content": text} for text in ("Rain", "and wind")]
            await create(client, messages=[*system, message, *results], tools=TOOLS)
    assert called(message) == [("weather", {"city": "Köln"})]
    assert first.startswith("<|bos|><|start|>system\nBe brief.\n\nYou can call tools.")
    assert '"name": "weather", "description": "How it is.", "parameters": {' in first
    assert f"<|start|>assistant\n{CALL}<|end|>" in prompt_of(engine)
    result = "<tool_response>\nRain\n</tool_response>\n<tool_response>\nand wind\n</tool_response>"
    assert f"<|start|>user\n{result}<|end|>" in prompt_of(engine)
    assert sum("knows nothing of tools" in record.message for record in caplog.records) == 1


async def test_a_template_that_takes_one_call_a_turn_gets_them_one_by_one(harness):
    """As Llama 3's does."""
    refuses = "{% for m in messages %}{% if m.tool_calls and m.tool_calls | length > 1 %}{{ raise_exception('One!') }}"
    async with api(harness, TWO, template=refuses + "{% endif %}{% endfor %}" + TEMPLATE) as (client, engine):
        message = (await create(client, tools=TOOLS)).choices[0].message
        first, second = (call.id for call in message.tool_calls)
        results = [
            {"role": "tool", "tool_call_id": second, "content": "Noon"},
            {"role": "tool", "tool_call_id": first, "content": "Rain"},
        ]
        await create(client, messages=[*ASK, message, *results], tools=TOOLS)
    now = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    assert prompt_of(engine).endswith(f"{WRITTEN}<|tool|>Rain<|assistant|>{now}<|tool|>Noon<|assistant|>")


async def test_the_old_names(harness):
    async with api(harness, CALL, CALL) as (client, engine):
        answer = (await create(client, functions=[WEATHER["function"]])).choices[0]
        named = (await create(client, functions=[WEATHER["function"]], function_call={"name": "weather"})).choices[0]
        chunks = [chunk async for chunk in await create(client, functions=[WEATHER["function"]], stream=True)]
        old = [
            *ASK,
            answer.message.model_dump(exclude_none=True),
            {"role": "function", "name": "weather", "content": "Rain"},
        ]
        await create(client, messages=old, functions=[WEATHER["function"]])
    assert (answer.message.function_call.name, answer.finish_reason) == ("weather", "function_call")
    assert json.loads(answer.message.function_call.arguments) == {"city": "Köln"}
    assert (answer.message.tool_calls, named.finish_reason) == (None, "stop")
    deltas = [chunk.choices[0].delta.function_call for chunk in chunks if chunk.choices[0].delta.function_call]
    assert "".join(delta.arguments for delta in deltas) == answer.message.function_call.arguments
    assert f"{WRITTEN}<|tool|>Rain" in prompt_of(engine)


async def test_a_structured_answer_or_calls(harness):
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": CITY}}
    async with api(harness, CALL) as (client, engine):
        await create(client, tools=TOOLS, response_format=form)
        with pytest.raises(openai.BadRequestError, match="tool_choice asks for a call") as refused:
            await create(client, tools=TOOLS, response_format=form, tool_choice="required")
    assert refused.value.param == "tool_choice"
    grammar = engine.seen[0].params.structured_outputs.grammar
    assert "answer: %json" in grammar
    assert "<tool_call>" in grammar


@pytest.mark.parametrize("body", [{"logprobs": True, "top_logprobs": 1}, {"extra_body": {"return_token_ids": True}}])
async def test_tokens_are_all_there_beside_calls(harness, body):
    async with api(harness, "Hm. " + CALL, step=2) as (client, _):
        whole = (await create(client, tools=TOOLS, **body)).choices[0]
        chunks = [chunk.choices[0] async for chunk in await create(client, tools=TOOLS, stream=True, **body)]
    tokens = len(("Hm. " + CALL).encode()) + 1
    if "logprobs" in body:
        assert len(whole.logprobs.content) == tokens
        assert sum(len(chunk.logprobs.content) for chunk in chunks if chunk.logprobs) == tokens
    else:
        assert len(whole.token_ids) == tokens
        assert sum(len(getattr(chunk, "token_ids", None) or []) for chunk in chunks) == tokens


async def test_cut_off_calls_and_stop_strings(harness):
    async with api(harness, "Hm. " + CALL) as (client, _):
        short = (await create(client, tools=TOOLS, max_tokens=51)).choices[0]
        stopped = (await create(client, tools=TOOLS, stop=["</tool_call>"])).choices[0]
        broken = (await create(client, tools=TOOLS, max_tokens=25)).choices[0]
    assert short.finish_reason == "length"
    assert short.message.tool_calls[0].function.arguments == '{"'
    assert (called(stopped.message), stopped.finish_reason) == ([("weather", {"city": "Köln"})], "tool_calls")
    assert broken.message.content == ("Hm. " + CALL)[:25]


def tool(**function):
    return {"type": "function", "function": {"name": "f", **function}}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": "f"}, "tools"),
        ({"tools": [tool(), tool()]}, "tools[1].function.name"),
        ({"tools": [tool(name="a b")]}, "tools[0].function.name"),
        ({"tools": [tool(name="")]}, "tools[0].function.name"),
        ({"tools": [tool(parameters=[])]}, "tools[0].function.parameters"),
        ({"tools": [tool(parameters={"type": "string"})]}, "tools[0].function.parameters"),
        ({"tools": [tool(parameters={"type": "objekt"})]}, "tools[0].function.parameters.type"),
        (
            {"tools": [tool(), tool(name="g", parameters={"properties": {"a": {"items": {"type": "int"}}}})]},
            "tools[1].function.parameters.properties.a.items.type",
        ),
        ({"tools": [tool(parameters={"properties": ["a"]})]}, "tools[0].function.parameters.properties"),
        ({"tools": [tool(parameters={"required": "a"})]}, "tools[0].function.parameters.required"),
        ({"tools": [tool(strict="yes")]}, "tools[0].function.strict"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tools": TOOLS, "parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"tools": TOOLS, "functions": [{"name": "f"}]}, "functions"),
        ({"functions": [{"name": "f"}], "function_call": {"name": "g"}}, "function_call"),
        ({"messages": [*ASK, {"role": "assistant", "tool_calls": "f"}]}, "messages[1].tool_calls"),
        ({"messages": [*ASK, {"role": "assistant", "tool_calls": [{"id": 1}]}]}, "messages[1].tool_calls[0].id"),
        (
            {"messages": [*ASK, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 1}}]}]},
            "messages[1].tool_calls[0].function.arguments",
        ),
    ],
    ids=str,
)
async def test_bad_tools_are_refused_by_name(harness, body, param):
    async with harness.http(harness.Client()) as http:
        response = await http.post("/v1/chat/completions", json={"messages": ASK, **body})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param, error
    assert error["message"].startswith(param.split(".")[0].split("[")[0])


async def test_what_asks_for_nothing_is_taken(harness):
    async with harness.http(harness.Client()) as http:
        for body in ({"tools": [], "tool_choice": "auto"}, {"tools": None, "tool_choice": "none", "functions": []}):
            response = await http.post("/v1/chat/completions", json={"messages": ASK, **body})
            assert response.status_code == 200, response.text


async def test_tokenize_shows_the_prompt_with_tools(harness):
    async with harness.http(harness.Client(), chat_template=TEMPLATE) as http:
        with_tools = (await http.post("/tokenize", json={"messages": ASK, "tools": TOOLS})).json()
        without = (await http.post("/tokenize", json={"messages": ASK})).json()
    assert with_tools["count"] > without["count"] + len(json.dumps(CITY))

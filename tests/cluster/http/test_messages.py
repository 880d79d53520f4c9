"""/v1/messages as Anthropic's official client calls it: blocks in, named events and blocks out, its errors."""

import contextlib
import dataclasses
import json
import logging
import re

import anthropic
import httpx2
import pydantic
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.cluster.ingress.client import ReplicaLost
from octavo.cluster.ingress.messages.body import MessagesBody
from octavo.cluster.ingress.messages.convert import chat_body
from octavo.engine.errors import CapacityError, StepError
from octavo.engine.text.byte_tokenizer import ByteTokenizer

HI = [{"role": "user", "content": "Hi"}]
WEATHER = {
    "name": "get_weather",
    "description": "The weather at a place.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern"}}\n</tool_call>'
HERMES = {"tool_call_parser": "hermes", "reasoning_parser": "qwen3"}


class Person(pydantic.BaseModel):
    name: str
    age: int


@contextlib.asynccontextmanager
async def talking(harness, client, context=4096, key="key", **given):
    """The official client of an application without a socket. Streams arrive whole."""
    client.info_value = dataclasses.replace(harness.info, max_model_len=context)
    http = anthropic.DefaultAsyncHttpxClient(transport=httpx2.ASGITransport(harness.app(client, **given)))
    async with anthropic.AsyncAnthropic(base_url="http://octavo", api_key=key, max_retries=0, http_client=http) as api:
        yield api


def ask(**body):
    return {"model": "scripted", "max_tokens": 500, "messages": HI, **body}


async def streamed(api, **body):
    """(the events of a stream, the message that the client has made of them)."""
    async with api.messages.stream(**ask(**body)) as stream:
        events = [event async for event in stream]
        return events, await stream.get_final_message()


def prompt(client, number=-1):
    """What the model was given."""
    text = ByteTokenizer().decode(client.seen[number].prompt_token_ids, skip_special_tokens=False)
    return text.removeprefix("<|bos|>").removesuffix("<|start|>assistant\n")


def said(role, text):
    return f"<|start|>{role}\n{text}<|end|>\n"


def without_ids(message):
    values = message.to_dict()
    for block in values["content"]:
        block.pop("id", None)
    return {name: value for name, value in values.items() if name != "id" and value is not None}


async def read_to_the_end(stream, events):
    async for event in stream:
        events.append(event)


async def test_a_whole_message(harness):
    client = harness.Client()
    async with talking(harness, client) as api:
        message = await api.messages.create(
            **ask(system="Be kind.", extra_body={"temperature": 0.5, "top_k": 7, "top_p": 0.9})
        )
    assert [(block.type, block.text) for block in message.content] == [("text", "Hello, world")]
    assert (message.type, message.role, message.model, message.stop_reason) == (
        "message",
        "assistant",
        "scripted",
        "end_turn",
    )
    assert message.stop_sequence is None
    prompt_tokens = len(client.seen[0].prompt_token_ids)
    usage = message.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (prompt_tokens - 3, 3, 13)
    params = client.seen[0].params
    assert (params.temperature, params.top_k, params.top_p, params.max_tokens) == (0.5, 7, 0.9, 500)
    assert prompt(client) == said("system", "Be kind.") + said("user", "Hi")
    assert message._request_id


async def test_the_events_of_a_text(harness):
    async with harness.http(harness.Client(replies=("abc",))) as http:
        response = await http.post("/v1/messages", json=ask(stream=True))
    events = [block.split("\n") for block in response.text.removesuffix("\n\n").split("\n\n")]
    assert all(len(lines) == 2 for lines in events)
    data = [json.loads(line.removeprefix("data: ")) for _, line in events]
    assert [name.removeprefix("event: ") for name, _ in events] == [body["type"] for body in data]
    assert [body["type"] for body in data] == [
        "message_start",
        "ping",
        "content_block_start",
        *["content_block_delta"] * 3,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert data[0]["message"]["content"] == []
    assert [body["delta"]["text"] for body in data[3:6]] == ["a", "b", "c"]
    assert data[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert data[-2]["usage"]["output_tokens"] == 4


ANSWERS = [
    "",
    "\n\nHello",
    "Hello, world",
    f"<think>\nWhich city?\n</think>\n\nLet me see.\n{CALL}",
    f"{CALL}\n{CALL}",
    f"<think>a</think>\n\n{CALL}\n",
    "<think>never ends",
]


@pytest.mark.parametrize("max_tokens", [500, 70, 20, 5])
@pytest.mark.parametrize("answer", ANSWERS)
async def test_streamed_is_whole(harness, answer, max_tokens):
    async with talking(harness, harness.Client(replies=(answer,), step=3), **HERMES) as api:
        for thinking in ({"type": "adaptive"}, {"type": "adaptive", "display": "omitted"}):
            body = {"tools": [WEATHER], "max_tokens": max_tokens, "thinking": thinking}
            whole = await api.messages.create(**ask(**body))
            events, accumulated = await streamed(api, **body)
            assert without_ids(accumulated) == without_ids(whole)
            check_events(events)
    assert whole.content, "there is always something to show"
    calls = [block for block in whole.content if block.type == "tool_use"]
    if max_tokens < len(answer):
        assert whole.stop_reason == "max_tokens"
    else:
        assert whole.stop_reason == ("tool_use" if CALL in answer else "end_turn")
        assert [call.input for call in calls] == [{"city": "Bern"}] * answer.count(CALL)
    assert all(block.text.strip() or len(whole.content) == 1 for block in whole.content if block.type == "text")


def check_events(events):
    """Blocks are begun, filled and ended, one after the other, and numbered so."""
    open_block, ended = None, 0
    for event in events:
        if event.type == "content_block_start":
            assert open_block is None
            assert event.index == ended
            open_block = event.index
        elif event.type == "content_block_delta":
            assert event.index == open_block
        elif event.type == "content_block_stop":
            assert event.index == open_block
            open_block, ended = None, ended + 1
    assert open_block is None
    assert [event.type for event in events][-2:] == ["message_delta", "message_stop"]


async def test_messages_and_events_are_of_the_clients_types(harness):
    """The client itself takes anything: here nothing may be missing, or of another type."""
    event_type = pydantic.TypeAdapter(RawMessageStreamEvent)
    client = harness.Client(replies=(ANSWERS[3],), step=3)
    client.info_value = dataclasses.replace(harness.info, max_model_len=4096)
    async with harness.http(client, **HERMES) as http:
        whole = await http.post("/v1/messages", json=ask(tools=[WEATHER]))
        stream = await http.post("/v1/messages", json=ask(tools=[WEATHER], stream=True))
    message = Message.model_validate_json(whole.text, strict=True)
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
    for name, data in (block.split("\n") for block in stream.text.strip().split("\n\n")):
        if name != "event: ping":
            assert event_type.validate_json(data.removeprefix("data: "), strict=True).type == name.removeprefix(
                "event: "
            )


async def test_stop_sequences(harness):
    async with talking(harness, harness.Client()) as api:
        whole = await api.messages.create(**ask(stop_sequences=["xx", "wo"]))
        _, accumulated = await streamed(api, stop_sequences=["xx", "wo"])
    assert (whole.content[0].text, whole.stop_reason, whole.stop_sequence) == ("Hello, ", "stop_sequence", "wo")
    assert without_ids(accumulated) == without_ids(whole)


async def test_a_tool_round_trip(harness):
    replies = iter((CALL, "It is sunny."))
    client = harness.Client(reply_of=lambda request: next(replies))
    async with talking(harness, client, **HERMES) as api:
        first = await api.messages.create(**ask(tools=[WEATHER], tool_choice={"type": "auto"}))
        (call,) = first.content
        assert (call.type, call.name, call.input) == ("tool_use", "get_weather", {"city": "Bern"})
        result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "sunny"}]}
        turns = [*HI, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
        second = await api.messages.create(**ask(tools=[WEATHER], messages=turns))
    assert second.content[0].text == "It is sunny."
    assert "sunny" in prompt(client)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("no such city", "Error: no such city"),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "Error: a\nb"),
    ],
)
def test_a_failed_tool_is_told_as_failed(content, told):
    (message,) = results_of({"content": content, "is_error": True})
    assert (message.role, message.text) == ("tool", told)


def test_a_failed_tool_that_says_nothing_is_told_as_failed():
    assert results_of({"is_error": True})[0].text.startswith("Error: ")
    assert results_of({})[0].text == ""


def results_of(result):
    """The chat messages of a tool's result."""
    call = {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "get_weather", "input": {}}]}
    answer = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", **result}]}
    return chat_body(MessagesBody(max_tokens=1, messages=[*HI, call, answer])).messages[2:]


async def test_thinking_is_a_block_and_goes_back(harness):
    client = harness.Client(replies=("<think>\nHm.\n</think>\n\nYes.",))
    async with talking(harness, client, **HERMES) as api:
        message = await api.messages.create(**ask(thinking={"type": "enabled", "budget_tokens": 100}))
        thought, text = message.content
        assert (thought.type, thought.thinking, text.text) == ("thinking", "Hm.", "Yes.")
        assert thought.signature
        turns = [*HI, message.to_param(), *HI]
        await api.messages.create(**ask(messages=turns))
    assert prompt(client) == said("user", "Hi") + said("assistant", "Yes.") + said("user", "Hi")


def test_thinking_reaches_the_template():
    for thinking, told in (("enabled", True), ("adaptive", True), ("disabled", False)):
        body = MessagesBody.model_validate({"max_tokens": 9, "messages": HI, "thinking": {"type": thinking}})
        assert chat_body(body).chat_template_kwargs == {"enable_thinking": told}
    assert chat_body(MessagesBody(max_tokens=9, messages=HI)).chat_template_kwargs is None


async def test_an_answer_that_was_begun_is_continued(harness):
    client = harness.Client()
    async with talking(harness, client) as api:
        message = await api.messages.create(**ask(messages=[*HI, {"role": "assistant", "content": "Well"}]))
    assert message.content[0].text == "Hello, world"
    assert prompt(client) == said("user", "Hi") + "<|start|>assistant\nWell"


async def test_structured_text(harness):
    client = harness.Client(replies=('{"name": "Ann", "age": 3}',))
    async with talking(harness, client) as api:
        parsed = await api.messages.parse(**ask(output_format=Person))
        async with api.messages.stream(**ask(output_format=Person)) as stream:
            accumulated = await stream.get_final_message()
    assert parsed.parsed_output == accumulated.parsed_output == Person(name="Ann", age=3)
    assert json.loads(client.seen[0].params.structured_outputs.json)["required"] == ["name", "age"]


async def test_more_than_the_context_holds_ends_with_the_context(harness):
    client = harness.Client(replies=("x" * 100,))
    async with talking(harness, client, context=100) as api:
        message = await api.messages.create(**ask(max_tokens=10000))
    assert message.stop_reason == "model_context_window_exceeded"
    assert message.usage.output_tokens == 100 - len(client.seen[0].prompt_token_ids)


async def test_counted_tokens_are_those_of_the_prompt(harness):
    client = harness.Client()
    body = {"messages": HI, "system": [{"type": "text", "text": "Be kind."}], "tools": [WEATHER]}
    async with talking(harness, client, **HERMES) as api:
        counted = await api.messages.count_tokens(model="scripted", **body)
        message = await api.messages.create(**ask(**body))
    usage = message.usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


TOOL_USE = {"type": "tool_use", "id": "c", "name": "get_weather", "input": {}}
BAD = [
    ({"messages": []}, "messages must not be empty"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": [{"role": "robot", "content": "Hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "'image'"),
    ({"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]}, "'document'"),
    ({"messages": [{"role": "user", "content": [TOOL_USE]}]}, "'tool_use'"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text is required"),
    ({"messages": [*HI, {"role": "assistant", "content": [TOOL_USE]}]}, "messages[1] calls tools"),
    ({"messages": [*HI, {"role": "assistant", "content": ""}]}, "messages[1] has no text"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "zz"}]}]}, "'zz'"),
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"stop_sequences": "x"}, "stop_sequences"),
    ({"stop_sequences": [""]}, "stop_sequences"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
    ({"tools": [{"name": "a"}]}, "tools[0].input_schema is required"),
    ({"tools": [{"name": "a", "input_schema": {"type": "array"}}]}, "tools[0].input_schema"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
    ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "x"}}, "'x'"),
    ({"thinking": {"type": "enabled", "budget_tokens": 500}}, "budget_tokens"),
    ({"thinking": {"type": "much"}}, "thinking.type"),
    ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
    ({"messages": [{"role": "user", "content": "x" * 600}]}, "context"),
]


@pytest.mark.parametrize(("body", "words"), BAD, ids=[words for _, words in BAD])
async def test_bad_values_are_refused_in_the_envelope(harness, body, words):
    client = harness.Client()
    async with harness.http(client) as http:
        response = await http.post("/v1/messages", json=ask(**body))
    assert response.status_code == 400, response.text
    reply = response.json()
    assert (reply["type"], reply["error"]["type"]) == ("error", "invalid_request_error")
    assert words in reply["error"]["message"]
    assert reply["request_id"] == response.headers["request-id"]
    assert client.seen == []


@pytest.mark.parametrize(
    ("cause", "status", "kind"),
    [
        (CapacityError("Full.", 7), 429, "rate_limit_error"),
        (ReplicaLost("Gone."), 503, "overloaded_error"),
        (StepError("secret detail"), 500, "api_error"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_goes_wrong_is_said_in_the_envelope(harness, cause, status, kind, stream):
    async with talking(harness, harness.Client(fail=cause)) as api:
        with pytest.raises(anthropic.APIStatusError) as early:
            await api.messages.create(**ask(stream=stream))
    assert (early.value.status_code, early.value.type) == (status, kind)
    assert early.value.request_id
    assert ("retry-after" in early.value.response.headers) == (status != 500)
    async with talking(harness, harness.Client(fail_after=(3, cause))) as api:
        stream, events = await api.messages.create(**ask(stream=True)), []
        with pytest.raises(anthropic.APIStatusError) as late:
            await read_to_the_end(stream, events)
    assert [event.type for event in events].count("content_block_delta") == 3
    assert late.value.type == kind


async def test_keys_models_and_paths_that_are_not_there(harness):
    async with talking(harness, harness.Client(), key="wrong", api_keys=("key",)) as api:
        with pytest.raises(anthropic.AuthenticationError) as refused:
            await api.messages.create(**ask())
    async with talking(harness, harness.Client(), api_keys=("key",)) as api:
        await api.messages.create(**ask())
        with pytest.raises(anthropic.NotFoundError) as no_model:
            await api.messages.create(**ask(model="claude"))
        with pytest.raises(anthropic.NotFoundError) as no_path:
            await api.messages.batches.list()
        with pytest.raises(anthropic.NotFoundError) as no_file:
            await api.beta.files.list()
    for error, kind in (
        (refused, "authentication_error"),
        (no_model, "not_found_error"),
        (no_path, "not_found_error"),
        (no_file, "not_found_error"),
    ):
        assert error.value.type == kind
        assert error.value.body["type"] == "error"


@pytest.mark.parametrize(("key", "status"), [("key", 200), ("wrong", 401), ("", 401)])
async def test_a_bare_key_in_its_header(harness, key, status):
    async with harness.http(harness.Client(), api_keys=("key",)) as http:
        response = await http.post("/v1/messages", json=ask(), headers={"x-api-key": key})
        both = await http.post(
            "/v1/messages", json=ask(), headers={"x-api-key": key, "authorization": "Bearer nothing"}
        )
    assert response.status_code == both.status_code == status


async def test_a_body_that_is_too_long(harness):
    async with talking(harness, harness.Client(), max_body_bytes=300) as api:
        with pytest.raises(anthropic.APIStatusError) as refused:
            await api.messages.create(**ask(system="x" * 300))
    assert (refused.value.status_code, refused.value.type) == (413, "request_too_large")


async def test_unknown_fields_are_taken_and_reported_once(harness, caplog):
    body = ask(new_field=1, metadata={"user_id": "u"}, cache_control={"type": "ephemeral"}, service_tier="auto")
    async with harness.http(harness.Client()) as http:
        for _ in range(2):
            assert (await http.post("/v1/messages", json=body)).status_code == 200
    warned = [record.getMessage() for record in caplog.records if "unknown field" in record.getMessage()]
    assert warned == ["requests have an unknown field 'new_field': it has no effect"]


@pytest.mark.parametrize(("path", "body"), [("/v1/messages", ask()), ("/v1/responses", {"input": "Hi"})])
@pytest.mark.parametrize("stream", [False, True])
async def test_access_log_metrics_and_document_know_the_paths(harness, caplog, path, body, stream):
    with caplog.at_level(logging.INFO, "octavo.access"):
        async with harness.http(harness.Client()) as http:
            await http.post(path, json={**body, "stream": stream}, headers={"x-request-id": "one"})
            metrics = (await http.get("/metrics")).text
            document = (await http.get("/openapi.json")).json()
    line = next(record.getMessage() for record in caplog.records if record.name == "octavo.access")
    for part in (f"POST '{path}' id=one ", "status=200", "prompt_tokens=22", "completion_tokens=13", "outcome=stop"):
        assert part in line
    assert re.search(r'^octavo:request_success_total\{.*finished_reason="stop".*\} [1-9]', metrics, re.MULTILINE)
    reference = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    assert body.keys() <= document["components"]["schemas"][reference.rsplit("/", 1)[1]]["properties"].keys()


async def test_a_client_that_leaves_ends_its_request(harness):
    client = harness.Client(hang_after=4)
    with harness.server(client) as url:
        async with anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as api:
            stream = await api.messages.create(**ask(stream=True))
            async for event in stream:
                if event.type == "content_block_delta":
                    break
            await stream.close()
            await harness.eventually(lambda: client.aborted and not client.live)


# Conversions

TEXT = st.builds(lambda text: {"type": "text", "text": text}, st.text(min_size=1))
THOUGHT = st.builds(lambda text: {"type": "thinking", "thinking": text, "signature": "s"}, st.text(min_size=1))
TURNS = st.lists(
    st.one_of(
        st.builds(lambda blocks: {"role": "user", "content": blocks}, st.lists(TEXT, min_size=1, max_size=3)),
        st.builds(
            lambda blocks: {"role": "assistant", "content": blocks},
            st.lists(st.one_of(TEXT, THOUGHT, st.just(TOOL_USE)), min_size=1, max_size=4),
        ),
    )
)


@given(TURNS)
@settings(max_examples=100, deadline=None)
def test_a_conversation_keeps_all_that_was_said_in_order(turns):
    """Reading the chat's messages from first to last gives the blocks again, neighbours of one kind joined."""
    chat = chat_body(MessagesBody.model_validate({"max_tokens": 9, "messages": [*turns, *HI]}))
    told = []
    for message in chat.messages:
        extra = message.model_extra
        if "reasoning_content" in extra:
            told.append(("thinking", extra["reasoning_content"]))
        if message.role != "assistant" or message.text:
            told.append((message.role, message.text))
        told.extend(("call", call["id"]) for call in extra.get("tool_calls", ()))
    expected = []
    for turn in [*turns, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]:
        if turn["role"] == "user":
            text = "\n".join(block["text"] for block in turn["content"])
            if expected and expected[-1][0] == "user":
                text = f"{expected.pop()[1]}\n\n{text}"
            expected.append(("user", text))
            continue
        for block in turn["content"]:
            kind = {"text": "assistant", "thinking": "thinking", "tool_use": "call"}[block["type"]]
            said_so = block.get("text") or block.get("thinking") or block["id"]
            if kind != "call" and expected and expected[-1][0] == kind:
                said_so = expected.pop()[1] + said_so
            expected.append((kind, said_so))
    assert told == expected

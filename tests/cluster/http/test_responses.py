"""/v1/responses as the official client calls it: items in, typed events and items out, what is stored."""

import contextlib
import dataclasses
import json

import httpx2
import openai
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent

from octavo.cluster.ingress.client import ReplicaLost
from octavo.cluster.ingress.responses.body import ResponsesBody
from octavo.cluster.ingress.responses.convert import chat_body, read_item
from octavo.cluster.ingress.responses.store import ResponseStore, Stored
from octavo.engine.text.byte_tokenizer import ByteTokenizer

WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather at a place.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern"}}\n</tool_call>'
HERMES = {"tool_call_parser": "hermes", "reasoning_parser": "qwen3"}


class Person(pydantic.BaseModel):
    name: str
    age: int


@contextlib.asynccontextmanager
async def talking(harness, client, context=4096, **given):
    """The official client of an application without a socket. Streams arrive whole."""
    client.info_value = dataclasses.replace(harness.info, max_model_len=context)
    transport = httpx2.ASGITransport(harness.app(client, **given))
    http = openai.DefaultAsyncHttpxClient(transport=transport)
    async with openai.AsyncOpenAI(base_url="http://octavo/v1", api_key="key", max_retries=0, http_client=http) as api:
        yield api


async def streamed(api, **body):
    """(the events of a stream, the response that the client has made of them)."""
    async with api.responses.stream(model="scripted", **body) as stream:
        events = [event async for event in stream]
        return events, await stream.get_final_response()


async def read_to_the_end(stream, events):
    async for event in stream:
        events.append(event)


def prompt(client, number=-1):
    """What the model was given."""
    text = ByteTokenizer().decode(client.seen[number].prompt_token_ids, skip_special_tokens=False)
    return text.removeprefix("<|bos|>").removesuffix("<|start|>assistant\n")


def said(role, text):
    return f"<|start|>{role}\n{text}<|end|>\n"


def without_ids(response):
    """What of a response is the same in another one."""
    values = response.to_dict()
    for item in values["output"]:
        assert item.pop("id").startswith({"message": "msg_", "function_call": "fc_", "reasoning": "rs_"}[item["type"]])
        item.pop("call_id", None)
        for part in item.get("content", ()):
            part.pop("parsed", None)
        item.pop("parsed_arguments", None)
    return {name: value for name, value in values.items() if name not in ("id", "created_at", "completed_at")}


async def test_a_whole_response(harness):
    client = harness.Client()
    async with talking(harness, client) as api:
        response = await api.responses.create(
            model="scripted", input="Hi", instructions="Be kind.", temperature=0.5, top_p=0.9, metadata={"a": "b"}
        )
    assert response.output_text == "Hello, world"
    assert (response.status, response.object, response.model) == ("completed", "response", "scripted")
    assert (response.temperature, response.top_p, response.metadata) == (0.5, 0.9, {"a": "b"})
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert (response.usage.output_tokens, response.usage.input_tokens_details.cached_tokens) == (13, 3)
    assert client.seen[0].params.temperature == 0.5
    assert prompt(client) == said("system", "Be kind.") + said("user", "Hi")


async def test_the_events_of_a_text(harness):
    async with talking(harness, harness.Client(replies=("abc",))) as api:
        events, response = await streamed(api, input="Hi")
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * 3,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.delta for event in events if event.type.endswith("delta")] == ["a", "b", "c"]
    assert response.output_text == "abc"
    assert events[-4].item_id == events[-2].item.id == response.output[0].id


TEXTS = ["", "  ", "\n\nHello", "Hello, world"]
ANSWERS = [
    *TEXTS,
    f"<think>\nWhich city?\n</think>\n\nLet me see.\n{CALL}",
    f"{CALL}\n{CALL}",
    f"<think>a</think>\n\n{CALL}\n",
    "<think>never ends",
]


@pytest.mark.parametrize("summary", [None, "auto"])
@pytest.mark.parametrize("max_tokens", [None, 20, 70])
@pytest.mark.parametrize("answer", ANSWERS)
async def test_streamed_is_whole(harness, answer, max_tokens, summary):
    body = {
        "input": "Hi",
        "tools": [WEATHER],
        "max_output_tokens": max_tokens,
        "reasoning": {"summary": summary},
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
    }
    body = {name: value for name, value in body.items() if value is not None}
    async with talking(harness, harness.Client(replies=(answer,), step=3), **HERMES) as api:
        whole = await api.responses.create(model="scripted", **body)
        raw = [event async for event in await api.responses.create(model="scripted", stream=True, **body)]
        last = raw[-1]
        assert without_ids(last.response) == without_ids(whole)
        if whole.status == "completed":
            _, accumulated = await streamed(api, **body)
            assert without_ids(accumulated) == without_ids(whole)
    assert whole.output, "there is always something to show"
    assert last.type == f"response.{whole.status}"
    check_events(raw)
    is_cut = max_tokens is not None and max_tokens < len(answer)
    assert whole.status == ("incomplete" if is_cut else "completed")
    if is_cut:
        assert whole.incomplete_details.reason == "max_output_tokens"
    assert whole.output[-1].status == whole.status


def check_events(events):
    """Deltas add up to what is done; items are added, filled, done, one after the other; all are in the response."""
    assert [event.sequence_number for event in events] == list(range(len(events)))
    open_item, texts, done = None, {}, []
    for event in events:
        if event.type == "response.output_item.added":
            assert open_item is None
            assert event.output_index == len(done)
            open_item = event.item.id
            assert getattr(event.item, "arguments", "") == ""
        elif event.type == "response.output_item.done":
            assert event.item.id == open_item
            done.append(event.item)
            open_item = None
        elif hasattr(event, "item_id"):
            assert event.item_id == open_item
            if event.type.endswith("_part.added"):
                assert event.part.text == ""
            elif event.type.endswith(".delta"):
                texts[open_item] = texts.get(open_item, "") + event.delta
            elif event.type.endswith(("_text.done", "arguments.done")):
                full = event.arguments if event.type.endswith("arguments.done") else event.text
                assert full == texts.get(open_item, "")
    assert open_item is None
    assert done == events[-1].response.output


@pytest.mark.parametrize(
    "body", [{}, {"reasoning": {"summary": "auto"}}, {"max_output_tokens": 20}, {"top_logprobs": 1}], ids=str
)
@pytest.mark.parametrize("fails", [False, True])
async def test_responses_and_events_are_of_the_clients_types(harness, body, fails):
    """The client itself takes anything: here nothing may be missing, or of another type."""
    event_type = pydantic.TypeAdapter(ResponseStreamEvent)
    client = harness.Client(replies=(ANSWERS[4],), step=3)
    client.info_value = dataclasses.replace(harness.info, max_model_len=4096)
    body = {"input": "Hi", "tools": [{**WEATHER, "strict": False}], **body}
    async with harness.http(client, **HERMES) as http:
        whole = await http.post("/v1/responses", json=body)
        client.fail_after = (3, ReplicaLost("Gone.")) if fails else None
        stream = await http.post("/v1/responses", json={**body, "stream": True})
    Response.model_validate_json(whole.text, strict=True)
    for name, data in (block.split("\n") for block in stream.text.strip().split("\n\n")):
        assert event_type.validate_json(data.removeprefix("data: "), strict=True).type == name.removeprefix("event: ")
    assert ("response.failed" in stream.text) == fails


async def test_logprobs_of_a_text(harness):
    async with talking(harness, harness.Client(replies=("abc",))) as api:
        response = await api.responses.create(
            model="scripted", input="Hi", include=["message.output_text.logprobs"], top_logprobs=2
        )
        events, _ = await streamed(api, input="Hi", include=["message.output_text.logprobs"])
    (part,) = response.output[0].content
    assert [entry.token for entry in part.logprobs] == ["a", "b", "c"]
    assert [len(entry.top_logprobs) for entry in part.logprobs] == [2, 2, 2]
    deltas = [event.logprobs for event in events if event.type == "response.output_text.delta"]
    assert [[entry.token for entry in delta] for delta in deltas] == [["a"], ["b"], ["c"]]


async def test_a_tool_round_trip_by_items_and_by_id(harness):
    replies = iter((CALL, "It is sunny.", "It is sunny."))
    client = harness.Client(reply_of=lambda request: next(replies))
    async with talking(harness, client, **HERMES) as api:
        first = await api.responses.create(model="scripted", input="The weather in Bern?", tools=[WEATHER])
        (call,) = first.output
        assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "get_weather", {"city": "Bern"})
        output = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
        by_id = await api.responses.create(
            model="scripted", input=[output], previous_response_id=first.id, tools=[WEATHER]
        )
        question = {"role": "user", "content": "The weather in Bern?"}
        by_items = await api.responses.create(
            model="scripted", input=[question, *first.output, output], tools=[WEATHER], store=False
        )
    assert by_id.output_text == by_items.output_text == "It is sunny."
    assert by_id.previous_response_id == first.id
    assert prompt(client, 1) == prompt(client, 2)
    assert "sunny" in prompt(client)


async def test_structured_text(harness):
    client = harness.Client(replies=('{"name": "Ann", "age": 3}',))
    async with talking(harness, client) as api:
        parsed = await api.responses.parse(model="scripted", input="Who?", text_format=Person)
        _, accumulated = await streamed(api, input="Who?", text_format=Person)
        await api.responses.create(model="scripted", input="Who?", text={"format": {"type": "json_object"}})
    assert parsed.output_parsed == accumulated.output_parsed == Person(name="Ann", age=3)
    schemas = [request.params.structured_outputs.json for request in client.seen[:2]]
    assert [json.loads(schema)["required"] for schema in schemas] == [["name", "age"]] * 2
    assert client.seen[2].params.structured_outputs.json_object


async def test_thoughts_are_an_item_and_go_back(harness):
    client = harness.Client(replies=("<think>\nHm.\n</think>\n\nYes.",))
    async with talking(harness, client, **HERMES) as api:
        plain = await api.responses.create(model="scripted", input="Well?")
        summed = await api.responses.create(model="scripted", input="Well?", reasoning={"summary": "auto"})
        again = await api.responses.create(
            model="scripted",
            input=[{"role": "user", "content": "Well?"}, *plain.output, {"role": "user", "content": "?"}],
        )
    assert [item.type for item in plain.output] == ["reasoning", "message"]
    assert (plain.output[0].content[0].text, plain.output[0].summary) == ("Hm.", [])
    assert (summed.output[0].summary[0].text, summed.output[0].content) == ("Hm.", None)
    assert plain.output_text == again.output_text == "Yes."
    assert prompt(client) == said("user", "Well?") + said("assistant", "Yes.") + said("user", "?")


async def test_what_is_stored(harness):
    async with talking(harness, harness.Client()) as api:
        first = await api.responses.create(model="scripted", input="One")
        _, second = await streamed(api, input="Two", previous_response_id=first.id)
        assert await api.responses.retrieve(first.id) == first
        assert (await api.responses.retrieve(second.id)).output_text == second.output_text
        items = [item async for item in api.responses.input_items.list(second.id, order="asc", limit=2)]
        latest = await api.responses.input_items.list(second.id, limit=1)
        assert [item.content[0].text for item in items] == ["One", "Hello, world", "Two"]
        assert [item.content[0].text for item in latest.data] == ["Two"]
        assert latest.has_more
        reference = {"type": "item_reference", "id": first.output[0].id}
        referring = await api.responses.create(model="scripted", input=[reference, {"role": "user", "content": "?"}])
        assert referring.status == "completed"
        with pytest.raises(openai.BadRequestError, match="background"):
            await api.responses.cancel(first.id)
        await api.responses.delete(first.id)
        third = await api.responses.create(model="scripted", input="Three", previous_response_id=second.id)
        with pytest.raises(openai.NotFoundError):
            await api.responses.retrieve(first.id)
        with pytest.raises(openai.NotFoundError):
            await api.responses.delete(first.id)
        with pytest.raises(openai.BadRequestError, match="not found") as missing:
            await api.responses.create(model="scripted", input="?", previous_response_id=first.id)
        unstored = await api.responses.create(model="scripted", input="One", store=False)
        with pytest.raises(openai.NotFoundError):
            await api.responses.retrieve(unstored.id)
    assert third.status == "completed"
    assert missing.value.param == "previous_response_id"


@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from(["fresh", "latest", "drop"]))))
@settings(max_examples=60, deadline=None)
def test_the_store_never_holds_more_than_it_may(steps):
    store, latest = ResponseStore(20000), None
    for number, (length, kind) in enumerate(steps):
        if kind == "drop" and latest is not None:
            store.drop(latest.reply["id"])
            latest = None
            continue
        reply = {"id": f"r{number}", "output": [{"id": f"o{number}", "text": "x" * length * 200}]}
        stored = Stored.of(reply, ({"id": f"i{number}"},), latest if kind == "latest" else None)
        store.keep(stored)
        kept = store.find(f"r{number}")
        assert (kept is stored) == (stored.num_bytes <= 20000)
        assert (store.item(f"o{number}") is None) == (kept is None)
        latest = stored
    found = [stored for number in range(len(steps)) if (stored := store.find(f"r{number}"))]
    assert len(found) == len(store)
    assert sum(stored.num_bytes for stored in found) == store.num_bytes <= 20000
    for stored in found:
        assert stored.num_bytes > len(json.dumps(stored.conversation))


BAD = [
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].id", "not found"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        "input[0].content",
        "image",
    ),
    ({"input": [{"type": "computer_call", "id": "1"}]}, "input[0].type", "computer_call"),
    ({"input": [{"role": "robot", "content": "Hi"}]}, "input[0].role", "role"),
    ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input[0].call_id", "called"),
    ({"input": []}, "input", "required"),
    ({"input": 3}, "input", "string"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", "web_search"),
    ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name", "characters"),
    ({"tools": [WEATHER], "tool_choice": {"type": "file_search"}}, "tool_choice.type", "file_search"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice", "'x'"),
    ({"tool_choice": "sometimes"}, "tool_choice", "Input should be"),
    ({"background": True}, "background", "background"),
    ({"conversation": "conv_1"}, "conversation", "stored conversation"),
    ({"prompt": {"id": "p"}}, "prompt", "stored prompt"),
    ({"max_output_tokens": 0}, "max_output_tokens", "1"),
    ({"top_logprobs": 21}, "top_logprobs", "20"),
    ({"include": ["everything"]}, "include[0]", "Input should be"),
    ({"temperature": -1}, "temperature", "temperature"),
    ({"reasoning": {"effort": "huge"}}, "reasoning.effort", "Input should be"),
    ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema", "JSON Schema"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type", "json_object"),
    ({"truncation": "some"}, "truncation", "Input should be"),
    ({"metadata": {"a": 1}}, "metadata.a", "string"),
    ({"input": "x" * 600}, "input", "context"),
]


@pytest.mark.parametrize(
    ("body", "param", "words"), BAD, ids=[f"{param}-{number}" for number, (_, param, _) in enumerate(BAD)]
)
async def test_bad_values_are_refused_by_name(harness, body, param, words):
    client = harness.Client()
    async with harness.http(client) as http:
        response = await http.post("/v1/responses", json={"input": "Hi", **body})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"].startswith(param)
    assert words in error["message"]
    assert client.seen == []


async def test_unknown_fields_are_taken_and_reported_once(harness, caplog):
    async with harness.http(harness.Client()) as http:
        for _ in range(2):
            response = await http.post("/v1/responses", json={"input": "Hi", "new_field": 1, "max_tool_calls": 3})
            assert response.status_code == 200
    assert [record.getMessage() for record in caplog.records].count(
        "requests have an unknown field 'new_field': it has no effect"
    ) == 1


async def test_more_than_the_context_holds_is_what_it_holds(harness):
    client = harness.Client()
    async with talking(harness, client) as api:
        await api.responses.create(model="scripted", input="Hi", max_output_tokens=10**6)
    (request,) = client.seen
    assert request.params.max_tokens == 4096 - len(request.prompt_token_ids)


async def test_truncation_drops_the_first_turns(harness):
    client = harness.Client()
    talk = [{"role": role, "content": f"{number:3}" * 20} for number in range(9) for role in ("user", "assistant")]
    asked = {"role": "user", "content": "And?"}
    async with talking(harness, client, context=512) as api:
        with pytest.raises(openai.BadRequestError, match="context"):
            await api.responses.create(model="scripted", input=[*talk, asked], instructions="Be kind.")
        await api.responses.create(
            model="scripted", input=[*talk, asked], instructions="Be kind.", truncation="auto", max_output_tokens=100
        )
    texts = [said(item["role"], item["content"]) for item in talk]
    kept = prompt(client).removeprefix(said("system", "Be kind."))
    assert kept != prompt(client)
    dropped = next(
        number for number in range(0, len(talk), 2) if "".join(texts[number:]) + said("user", "And?") == kept
    )
    used = len(client.seen[0].prompt_token_ids)
    assert used <= 512 - 100 < used + len("".join(texts[dropped - 2 : dropped]))


async def test_counted_input_tokens_are_those_of_the_prompt(harness):
    client = harness.Client()
    async with talking(harness, client) as api:
        first = await api.responses.create(model="scripted", input="One")
        body = {"model": "scripted", "input": "Two", "instructions": "Be kind.", "previous_response_id": first.id}
        counted = await api.responses.input_tokens.count(**body)
        response = await api.responses.create(**body)
    assert counted.input_tokens == response.usage.input_tokens


async def test_an_error_in_a_stream_is_raised(harness):
    client = harness.Client(fail_after=(3, ReplicaLost("The replica is gone.")))
    async with talking(harness, client) as api:
        stream, events = await api.responses.create(model="scripted", input="Hi", stream=True), []
        with pytest.raises(openai.APIError, match="The replica is gone"):
            await read_to_the_end(stream, events)
    failed = events[-1]
    assert (failed.type, failed.response.status) == ("response.failed", "failed")
    assert failed.response.error.message == "The replica is gone."
    assert failed.response.output[0].content[0].text == "Hel"


async def test_a_client_that_leaves_ends_its_request(harness):
    client = harness.Client(hang_after=4)
    with harness.server(client) as url:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as api:
            stream = await api.responses.create(model="scripted", input="Hi", stream=True)
            async for event in stream:
                if event.type == "response.output_text.delta":
                    break
            await stream.close()
            await harness.eventually(lambda: client.aborted and not client.live)


# Conversions

ITEM = st.one_of(
    st.builds(lambda role, text: {"role": role, "content": text}, st.sampled_from(["user", "system"]), st.text()),
    st.builds(
        lambda text: {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]},
        st.text(min_size=1),
    ),
    st.builds(
        lambda text: {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": text}]},
        st.text(min_size=1),
    ),
    st.just({"type": "function_call", "call_id": "c", "name": "get_weather", "arguments": "{}"}),
)


@given(st.lists(ITEM, min_size=1))
@settings(max_examples=100, deadline=None)
def test_a_conversation_keeps_all_that_was_said_in_order(items):
    """Reading the chat's messages from first to last gives the items again, system texts joined."""
    body = ResponsesBody(input=items, instructions="Be kind.")
    chat = chat_body(body, [read_item(item, "input") for item in items], 0)
    told = []
    for message in chat.messages:
        extra = message.model_extra
        if "reasoning_content" in extra:
            told.append(("reasoning", extra["reasoning_content"]))
        if message.role != "assistant" or message.text:
            told.append((message.role, message.text))
        told.extend(("call", call["function"]["name"]) for call in extra.get("tool_calls", ()))
    given_items = [("system", "Be kind.")]
    for item in items:
        kind, text = spoken(item)
        if kind == "system" == given_items[-1][0] and len(given_items) == 1:
            given_items[0] = (kind, f"{given_items[0][1]}\n\n{text}")
        elif kind == "reasoning" == given_items[-1][0]:
            given_items[-1] = (kind, given_items[-1][1] + text)
        else:
            given_items.append((kind, text))
    assert told == given_items


def spoken(item):
    match item.get("type"):
        case "reasoning":
            return "reasoning", item["content"][0]["text"]
        case "function_call":
            return "call", item["name"]
        case "message":
            return "assistant", item["content"][0]["text"]
    return item["role"], item["content"]

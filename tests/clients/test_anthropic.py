"""Anthropic's own client: a conversation with tools, thoughts, structured output, and what it raises."""

import anthropic
import pytest
from actor import SPEECH, Actor
from anthropic import beta_tool
from hosting import listening, service
from pydantic import BaseModel

from octavo.engine.errors import CapacityError

QUESTION = [{"role": "user", "content": "How is the weather in Paris and Oslo?"}]
TOOL = {
    "name": "get_weather",
    "description": "The weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
WEATHER = {"Paris": 21, "Rome": 27, "Oslo": -3}


class Report(BaseModel):
    city: str
    celsius: int


@pytest.fixture(scope="module")
def client(server):
    with anthropic.Anthropic(base_url=server, api_key="none", max_retries=0, timeout=30) as client:
        yield client


def results_of(message):
    """What the tools that `message` calls give; there is no weather in Oslo."""
    results = []
    for block in message.content:
        if block.type == "tool_use":
            failed = block.input["city"] == "Oslo"
            text = "no such station" if failed else f"{WEATHER[block.input['city']]} °C"
            results.append({"type": "tool_result", "tool_use_id": block.id, "content": text, "is_error": failed})
    return results


@pytest.mark.parametrize("model", ["actor", "thinker"])
@pytest.mark.parametrize("streams", [False, True])
def test_tools_one_of_which_fails(client, model, streams):
    def ask(messages):
        asked = {"model": model, "max_tokens": 1000, "messages": messages, "tools": [TOOL]}
        if not streams:
            return client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            return stream.get_final_message()

    first = ask(QUESTION)
    assert first.stop_reason == "tool_use"
    assert [block.input for block in first.content if block.type == "tool_use"] == [{"city": "Paris"}, {"city": "Oslo"}]
    second = ask(
        [*QUESTION, {"role": "assistant", "content": first.content}, {"role": "user", "content": results_of(first)}]
    )
    assert second.stop_reason == "end_turn"
    assert second.content[-1].text == "The tools say: 21 °C; Error: no such station."
    kinds = [block.type for block in second.content]
    assert kinds == (["thinking", "text"] if model == "thinker" else ["text"])
    assert second.usage.output_tokens > len(second.content[-1].text)


def test_events_of_a_stream(client):
    texts, thoughts = [], []
    with client.messages.stream(
        model="thinker", max_tokens=1000, messages=[{"role": "user", "content": "Hello!"}]
    ) as stream:
        for event in stream:
            if event.type == "text":
                texts.append(event.text)
            elif event.type == "thinking":
                thoughts.append(event.thinking)
        final = stream.get_final_message()
    assert len(texts) > 3
    assert [block.type for block in final.content] == ["thinking", "text"]
    assert ["".join(thoughts), "".join(texts)] == [final.content[0].thinking, final.content[1].text]


def test_thinking_can_be_turned_off(client):
    asked = {"model": "thinker", "max_tokens": 2000, "messages": [{"role": "user", "content": "Hello!"}]}
    on = client.messages.create(**asked, thinking={"type": "enabled", "budget_tokens": 1024})
    off = client.messages.create(**asked, thinking={"type": "disabled"})
    assert [block.type for block in on.content] == ["thinking", "text"]
    assert [block.type for block in off.content] == ["text"]


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_a_call_that_must_be_made(client, choice):
    hello = [{"role": "user", "content": "Hello!"}]
    made = client.messages.create(model="actor", max_tokens=500, messages=hello, tools=[TOOL], tool_choice=choice)
    assert [block.name for block in made.content] == ["get_weather"]


@pytest.mark.parametrize("model", ["actor", "thinker"])
def test_structured_output(client, model):
    question = [{"role": "user", "content": "It is 17 °C in Rome."}]
    made = client.messages.parse(model=model, max_tokens=500, messages=question, output_format=Report)
    assert made.parsed_output == Report(city="Rome", celsius=17)


def test_the_tool_runner(client):
    """It would have the server keep the conversation, and hears that this one does not."""

    @beta_tool
    def get_weather(city: str) -> str:
        """The weather of a city."""
        return f"{WEATHER[city]} °C"

    runner = client.beta.messages.tool_runner(model="actor", max_tokens=500, messages=QUESTION, tools=[get_weather])
    messages = list(runner)
    assert [message.stop_reason for message in messages] == ["tool_use", "end_turn"]
    assert messages[-1].content[0].text == "The tools say: 21 °C; -3 °C."


def test_tokens_are_counted_before(client):
    asked = {"model": "actor", "messages": QUESTION, "tools": [TOOL]}
    counted = client.messages.count_tokens(**asked)
    used = client.messages.create(**asked, max_tokens=500).usage
    assert counted.input_tokens == used.input_tokens + used.cache_read_input_tokens


def test_models(client):
    assert {"actor", "thinker", "fake"} < {model.id for model in client.models.list()}


def test_a_stop_sequence(client):
    made = client.messages.create(
        model="actor", max_tokens=500, messages=[{"role": "user", "content": "Hello!"}], stop_sequences=["and I"]
    )
    assert (made.stop_reason, made.stop_sequence) == ("stop_sequence", "and I")
    assert made.content[0].text == "You said “Hello!”, "


def test_errors_as_the_client_raises_them(client):
    asked = {"model": "actor", "max_tokens": 500, "messages": QUESTION}
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        client.messages.create(**asked, extra_body={"temperature": -1.0})
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(**{**asked, "model": "claude"})
    assert missing.value.body["error"]["type"] == "not_found_error"
    orphan = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "21"}]}
    with pytest.raises(anthropic.BadRequestError, match="tool_use_id"):
        client.messages.create(**{**asked, "messages": [*QUESTION, orphan]})


async def test_the_asynchronous_client(server):
    async with (
        anthropic.AsyncAnthropic(base_url=server, api_key="none", max_retries=0) as client,
        client.messages.stream(model="actor", max_tokens=500, messages=QUESTION, tools=[TOOL]) as stream,
    ):
        final = await stream.get_final_message()
    assert final.stop_reason == "tool_use"


def test_a_full_server_says_when_to_come_again():
    full = Actor()
    full.fail = CapacityError("Full.", 3)
    with (
        listening([service("actor", full, chat_template=SPEECH)]) as url,
        anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client,
        pytest.raises(anthropic.RateLimitError) as refused,
    ):
        client.messages.create(model="actor", max_tokens=500, messages=QUESTION)
    assert refused.value.response.headers["retry-after"] == "3"


def test_the_key_may_come_in_either_header(actor):
    with listening([service("actor", actor, chat_template=SPEECH, api_keys=("key",))]) as url:
        for given in ({"api_key": "key"}, {"auth_token": "key"}):
            client = anthropic.Anthropic(base_url=url, max_retries=0, **given)
            assert client.messages.count_tokens(model="actor", messages=QUESTION).input_tokens > 0
        with pytest.raises(anthropic.AuthenticationError):
            anthropic.Anthropic(base_url=url, api_key="wrong", max_retries=0).models.list()

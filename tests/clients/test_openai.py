"""OpenAI's own client: chat, responses and embeddings in conversation. What it does with errors, overload and streams
that are left is in tests/cluster/http/test_openai_client.py.
"""

import json

import openai
import pytest
from openai.lib.responses_tool_runner import RegisteredFunction, ResponsesToolRunner
from pydantic import BaseModel

WEATHER = {"Paris": 21, "Rome": 27, "Oslo": -3}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


class Report(BaseModel):
    city: str
    celsius: int


def get_weather(city: str) -> str:
    return f"{WEATHER[city]} °C in {city}"


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client


def results_of(message):
    """What the tools that `message` calls give, as messages."""
    return [
        {
            "role": "tool",
            "tool_call_id": call.id,
            "content": get_weather(**json.loads(call.function.arguments)),
        }
        for call in message.tool_calls
    ]


@pytest.mark.parametrize("model", ["actor", "thinker"])
def test_parallel_calls_and_their_results(client, model):
    messages = [{"role": "user", "content": "How is the weather in Paris and Oslo?"}]
    first = client.chat.completions.create(model=model, messages=messages, tools=[TOOL])
    choice = first.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert [call.function.name for call in choice.message.tool_calls] == ["get_weather"] * 2
    assert len({call.id for call in choice.message.tool_calls}) == 2
    messages += [choice.message, *results_of(choice.message)]
    second = client.chat.completions.create(model=model, messages=messages, tools=[TOOL])
    assert second.choices[0].message.content == "The tools say: 21 °C in Paris; -3 °C in Oslo."
    assert second.choices[0].finish_reason == "stop"
    if model == "thinker":
        assert "weather" in choice.message.reasoning_content


@pytest.mark.parametrize("model", ["actor", "thinker"])
def test_calls_add_up_in_the_stream_helper(client, model):
    messages = [{"role": "user", "content": "How is the weather in Rome and Oslo?"}]
    kinds, arguments = [], {}
    with client.chat.completions.stream(model=model, messages=messages, tools=[TOOL]) as stream:
        for event in stream:
            kinds.append(event.type)
            if event.type == "tool_calls.function.arguments.delta":
                arguments[event.index] = arguments.get(event.index, "") + event.arguments_delta
        final = stream.get_final_completion()
    assert kinds.count("tool_calls.function.arguments.done") == 2
    assert [json.loads(arguments[index]) for index in (0, 1)] == [{"city": "Rome"}, {"city": "Oslo"}]
    messages += [final.choices[0].message.to_dict(), *results_of(final.choices[0].message)]
    with client.chat.completions.stream(model=model, messages=messages, tools=[TOOL]) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
    assert text == "The tools say: 27 °C in Rome; -3 °C in Oslo."
    assert stream.get_final_completion().choices[0].message.content == text


@pytest.mark.parametrize("model", ["actor", "thinker"])
def test_a_chat_is_parsed(client, model):
    question = [{"role": "user", "content": "It is 17 °C in Rome."}]
    parsed = client.chat.completions.parse(model=model, messages=question, response_format=Report)
    assert parsed.choices[0].message.parsed == Report(city="Rome", celsius=17)
    with client.chat.completions.stream(model=model, messages=question, response_format=Report) as stream:
        snapshots = [event.parsed for event in stream if event.type == "content.delta"]
    assert stream.get_final_completion().choices[0].message.parsed == Report(city="Rome", celsius=17)
    assert {"city": "Rome"} in snapshots


def test_calls_are_parsed(client):
    question = [{"role": "user", "content": "How is Oslo?"}]
    tool = openai.pydantic_function_tool(Report, name="report")
    parsed = client.chat.completions.parse(model="actor", messages=question, tools=[tool], tool_choice="required")
    (call,) = parsed.choices[0].message.tool_calls
    assert call.function.parsed_arguments == Report(city="Oslo", celsius=21)


def test_a_named_tool_and_none(client):
    other = {"type": "function", "function": {"name": "log", "parameters": {"type": "object", "properties": {}}}}
    asked = {"model": "actor", "tools": [TOOL, other]}
    asked["messages"] = [{"role": "user", "content": "How is Rome?"}]
    named = client.chat.completions.create(**asked, tool_choice={"type": "function", "function": {"name": "log"}})
    assert [call.function.name for call in named.choices[0].message.tool_calls] == ["log"]
    none = client.chat.completions.create(**asked, tool_choice="none")
    assert none.choices[0].message.tool_calls is None
    assert "Rome" in none.choices[0].message.content


def test_json_object_and_choices(client):
    question = [{"role": "user", "content": "Is Rome hot, at 27 °C, or cold?"}]
    made = client.chat.completions.create(model="actor", messages=question, response_format={"type": "json_object"})
    assert json.loads(made.choices[0].message.content) == {"city": "Rome", "celsius": 27}
    among = {"structured_outputs": {"choice": ["cold", "hot"]}}
    chosen = client.chat.completions.create(model="actor", messages=question, extra_body=among)
    assert chosen.choices[0].message.content == "cold"


@pytest.mark.parametrize("model", ["actor", "thinker"])
def test_responses_call_a_tool_and_answer(client, model):
    tool = {"type": "function", **TOOL["function"], "strict": False}
    first = client.responses.create(model=model, input="How is the weather in Paris and Rome?", tools=[tool])
    calls = [item for item in first.output if item.type == "function_call"]
    results = [
        {"type": "function_call_output", "call_id": call.call_id, "output": get_weather(**json.loads(call.arguments))}
        for call in calls
    ]
    second = client.responses.create(model=model, previous_response_id=first.id, input=results, tools=[tool])
    assert second.output_text == "The tools say: 21 °C in Paris; 27 °C in Rome."
    assert any(item.type == "reasoning" for item in second.output) == (model == "thinker")
    stateless = [{"role": "user", "content": "How is the weather in Paris and Rome?"}, *first.output, *results]
    with client.responses.stream(model=model, input=stateless, tools=[tool], store=False) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert text == second.output_text == stream.get_final_response().output_text


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("model", ["actor", "thinker"])
def test_the_clients_own_runner_of_tools(client, model, streams):
    """It checks every item that the server sends, and the items of a stream against the response at its end."""
    tool = {"type": "function", "strict": False, **TOOL["function"]}
    runner = ResponsesToolRunner(functions=[RegisteredFunction(tool, lambda arguments: get_weather(**arguments))])
    asked = {"model": model, "input": "How is the weather in Rome and Oslo?"}
    answer = runner.run(client, asked, max_steps=3, stream=streams)
    assert answer.output_text == "The tools say: 27 °C in Rome; -3 °C in Oslo."


@pytest.mark.parametrize("model", ["actor", "thinker"])
def test_a_response_is_parsed(client, model):
    parsed = client.responses.parse(model=model, input="It is 17 °C in Rome.", text_format=Report)
    assert parsed.output_parsed == Report(city="Rome", celsius=17)
    with client.responses.stream(model=model, input="It is 17 °C in Rome.", text_format=Report) as stream:
        stream.until_done()
    assert stream.get_final_response().output_parsed == parsed.output_parsed


def test_embeddings(client):
    texts = ["one", "two", "one"]
    plain = client.embeddings.create(model="fake", input=texts, encoding_format="float")
    packed = client.embeddings.create(model="fake", input=texts)  # which the client has sent as base64
    vectors = [entry.embedding for entry in plain.data]
    assert [entry.index for entry in plain.data] == [0, 1, 2]
    assert vectors[0] == vectors[2] != vectors[1]
    assert [entry.embedding for entry in packed.data] == [pytest.approx(vector, rel=1e-6) for vector in vectors]
    as_ids = client.embeddings.create(model="fake", input=[256, *b"one"], encoding_format="float")
    assert as_ids.data[0].embedding == vectors[0]
    assert plain.usage.prompt_tokens == 3 * as_ids.usage.prompt_tokens == 12
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        client.embeddings.create(model="fake", input="one", dimensions=3)

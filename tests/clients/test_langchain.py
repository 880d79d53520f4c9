"""LangChain: ChatOpenAI in a loop with tools, structured output in each of its ways, and OpenAIEmbeddings."""

import openai
import pytest
from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field

WEATHER = {"Paris": 21, "Rome": 27, "Oslo": -3}


class Report(BaseModel):
    """The weather of a city."""

    city: str = Field(description="Its name")
    celsius: int


@tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"{WEATHER[city]} °C in {city}"


@pytest.fixture
def model(server):
    return ChatOpenAI(model="actor", base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=30)


def test_invoke_and_batch(model):
    answer = model.invoke([("system", "Be brief."), ("human", "Hello!")])
    assert answer.content == "You said “Hello!”, and I know no more."
    assert answer.usage_metadata["output_tokens"] == len(answer.content.encode()) + 1
    assert answer.response_metadata["finish_reason"] == "stop"
    several = model.batch([f"Question {number}" for number in range(4)])
    assert [f"“Question {number}”" in answer.content for number, answer in enumerate(several)] == [True] * 4


async def test_streams(model):
    whole = model.invoke("Hello!").content
    chunks = list(model.stream("Hello!", stream_usage=True))
    assert len(chunks) > 3
    assert "".join(chunk.content for chunk in chunks) == whole
    (usage,) = (chunk.usage_metadata for chunk in chunks if chunk.usage_metadata)
    assert usage["output_tokens"] == len(whole.encode()) + 1
    assert "".join([chunk.content async for chunk in model.astream("Hello!")]) == whole


@pytest.mark.parametrize("uses_responses_api", [False, True])
@pytest.mark.parametrize("streams", [False, True])
def test_a_loop_with_tools(server, streams, uses_responses_api):
    model = ChatOpenAI(
        model="actor", base_url=f"{server}/v1", api_key="none", max_retries=0, use_responses_api=uses_responses_api
    ).bind_tools([get_weather])

    def ask(messages):
        if not streams:
            return model.invoke(messages)
        chunks = list(model.stream(messages))
        return sum(chunks[1:], chunks[0])

    messages = [HumanMessage("How is the weather in Paris and Rome?")]
    for _ in range(3):
        answer = ask(messages)
        messages.append(answer)
        if not answer.tool_calls:
            break
        messages += [get_weather.invoke(call) for call in answer.tool_calls]
    assert [call["args"] for call in messages[1].tool_calls] == [{"city": "Paris"}, {"city": "Rome"}]
    assert [type(message) for message in messages[2:4]] == [ToolMessage, ToolMessage]
    assert messages[-1].text == "The tools say: 21 °C in Paris; 27 °C in Rome."
    assert isinstance(messages[-1], AIMessageChunk) == streams


@pytest.mark.parametrize("choice", ["any", "get_weather"])
def test_a_call_that_must_be_made(model, choice):
    answer = model.bind_tools([get_weather], tool_choice=choice).invoke("Hello!")
    assert [call["name"] for call in answer.tool_calls] == ["get_weather"]


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # LangChain's, of what the client has parsed
@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("strict", [None, True])
def test_structured_output(model, method, strict):
    asked = model.with_structured_output(Report, method=method, strict=strict, include_raw=True)
    answer = asked.invoke("It is 17 °C in Rome.")
    assert answer["parsing_error"] is None
    assert answer["parsed"] == Report(city="Rome", celsius=17)
    *_, last = model.with_structured_output(Report, method=method, strict=strict).stream("It is 17 °C in Rome.")
    assert last == Report(city="Rome", celsius=17)


def test_json_mode(model):
    asked = model.with_structured_output(Report, method="json_mode")
    assert asked.invoke("As JSON: it is 17 °C in Rome.") == Report(city="Rome", celsius=17)


def test_tools_and_a_structured_answer(model):
    asked = model.bind_tools([get_weather], response_format=Report, strict=True)
    messages = [HumanMessage("How is the weather in Oslo?")]
    messages.append(asked.invoke(messages))
    messages += [get_weather.invoke(call) for call in messages[-1].tool_calls]
    assert asked.invoke(messages).additional_kwargs["parsed"] == Report(city="Oslo", celsius=-3)


def test_thoughts_do_not_get_in_the_way(server):
    thinker = ChatOpenAI(model="thinker", base_url=f"{server}/v1", api_key="none", max_retries=0)
    assert thinker.with_structured_output(Report).invoke("It is 17 °C in Rome.") == Report(city="Rome", celsius=17)
    assert thinker.invoke("Hello!").content == "You said “Hello!”, and I know no more."


@pytest.mark.parametrize("streams", [False, True])
def test_thoughts_are_shown_where_they_are_asked_for(server, streams):
    asked = {"use_responses_api": True, "reasoning": {"summary": "auto"}}
    thinker = ChatOpenAI(model="thinker", base_url=f"{server}/v1", api_key="none", max_retries=0, **asked)
    chunks = list(thinker.stream("Hello!")) if streams else [thinker.invoke("Hello!")]
    blocks = sum(chunks[1:], chunks[0]).content_blocks
    assert [block["type"] for block in blocks] == ["reasoning", "text"]
    assert blocks[0]["reasoning"] == "What do I know about the weather?"


def test_errors_are_the_openai_clients(model):
    with pytest.raises(openai.BadRequestError, match="temperature"):
        model.bind(temperature=-1).invoke("Hello!")


async def test_embeddings(server):
    """Left to itself it sends the ids of an OpenAI model's tokens, which say nothing to another model."""
    embeddings = OpenAIEmbeddings(
        model="fake", base_url=f"{server}/v1", api_key="none", check_embedding_ctx_length=False, max_retries=0
    )
    one, two, again = embeddings.embed_documents(["one", "two", "one"])
    assert one == again != two
    assert embeddings.embed_query("two") == await embeddings.aembed_query("two") == two

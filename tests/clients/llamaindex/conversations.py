"""Conversations of LlamaIndex with a server: python conversations.py BASE_URL MODEL THOUGHTFUL_MODEL

Prints one JSON object: what each of them came to. Whether that is right is for the test to say. Runs where
LlamaIndex is installed, which is not where octavo is.
"""

import asyncio
import json
import sys

from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

BASE_URL, MODEL, THOUGHTFUL_MODEL = sys.argv[1:]
WEATHER = {"Paris": 21, "Rome": 27, "Oslo": -3}


class Report(BaseModel):
    """The weather of a city."""

    city: str
    celsius: int


def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"{WEATHER[city]} °C in {city}"


TOOL = FunctionTool.from_defaults(get_weather)


def llm(model: str = MODEL, **options) -> OpenAILike:
    return OpenAILike(
        model=model,
        api_base=BASE_URL,
        api_key="none",
        context_window=8192,
        is_chat_model=True,
        is_function_calling_model=True,
        max_retries=0,
        timeout=30,
        **options,
    )


def chat():
    answer = llm().chat([ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content="Hello!")])
    return answer.message.content


def stream_chat():
    return [answer.delta for answer in llm().stream_chat([ChatMessage(role="user", content="Hello!")])]


def complete():
    return llm().complete("Hello!").text


def complete_without_chat():
    text = OpenAILike(model=MODEL, api_base=BASE_URL, api_key="none", is_chat_model=False, max_tokens=200)
    return text.complete("Hello!").text


def predict_and_call():
    answer = llm().predict_and_call([TOOL], "How is the weather in Rome?")
    return str(answer)


def chat_with_tools():
    model = llm()
    question = ChatMessage(role="user", content="How is the weather in Paris and Oslo?")
    first = model.chat_with_tools([TOOL], chat_history=[question], allow_parallel_tool_calls=True)
    calls = model.get_tool_calls_from_response(first)
    results = [
        ChatMessage(
            role="tool", content=get_weather(**call.tool_kwargs), additional_kwargs={"tool_call_id": call.tool_id}
        )
        for call in calls
    ]
    second = model.chat_with_tools([TOOL], chat_history=[question, first.message, *results])
    return [[call.tool_name, call.tool_kwargs] for call in calls], second.message.content


def required():
    model = llm()
    answer = model.chat_with_tools([TOOL], "Hello!", tool_required=True)
    return [call.tool_name for call in model.get_tool_calls_from_response(answer)]


def agent(model: str = MODEL):
    async def run() -> str:
        return str(await FunctionAgent(tools=[TOOL], llm=llm(model)).run("How is the weather in Paris and Rome?"))

    return asyncio.run(run())


def thoughtful_agent():
    return agent(THOUGHTFUL_MODEL)


def structured_predict(**options):
    report = llm(**options).structured_predict(
        Report, PromptTemplate("It is {celsius} °C in {city}."), celsius=17, city="Rome"
    )
    return report.model_dump()


def structured_predict_by_schema():
    return structured_predict(should_use_structured_outputs=True)


def structured_llm():
    structured = llm().as_structured_llm(Report)
    return structured.complete("It is 17 °C in Rome.").raw.model_dump()


def streamed_structured_llm():
    structured = llm(should_use_structured_outputs=True).as_structured_llm(Report)
    *_, last = structured.stream_chat([ChatMessage(role="user", content="It is 17 °C in Rome.")])
    return last.raw.model_dump()


CONVERSATIONS = (
    chat,
    stream_chat,
    complete,
    complete_without_chat,
    predict_and_call,
    chat_with_tools,
    required,
    agent,
    thoughtful_agent,
    structured_predict,
    structured_predict_by_schema,
    structured_llm,
    streamed_structured_llm,
)


def come_to(talk):
    try:
        return talk()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


print(json.dumps({talk.__name__: come_to(talk) for talk in CONVERSATIONS}))

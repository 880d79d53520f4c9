"""Tools of an MCP server, brought to the model with OpenAI's client and by Anthropic's own adapter.

The example that does it over stdio is tested in tests/cluster/http/test_agent_mcp.py.
"""

import json

import anthropic
import openai
import pytest
from anthropic.lib.tools.mcp import async_mcp_tool
from mcp import Client
from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from pydantic import BaseModel

WEATHER = {"Paris": 21, "Rome": 27}
QUESTION = {"role": "user", "content": "How is the weather in Paris and Oslo?"}


class Report(BaseModel):
    city: str
    celsius: int


def weather_station() -> MCPServer:
    server = MCPServer("weather")

    @server.tool()
    def get_weather(city: str) -> str:
        """The weather of a city."""
        if city not in WEATHER:
            raise ToolError(f"no station in {city}")
        return f"{WEATHER[city]} °C in {city}"

    return server


@pytest.mark.parametrize("model", ["actor", "thinker"])
async def test_tools_one_of_which_fails_and_a_structured_answer(server, model):
    async with (
        Client(weather_station()) as station,
        openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client,
    ):
        tools = [
            {"type": "function", "function": {"name": tool.name, "parameters": tool.input_schema, "strict": True}}
            for tool in (await station.list_tools()).tools
        ]
        messages = [QUESTION]
        first = await client.chat.completions.create(model=model, messages=messages, tools=tools)
        messages.append(first.choices[0].message)
        failed = []
        for call in first.choices[0].message.tool_calls:
            result = await station.call_tool(call.function.name, json.loads(call.function.arguments))
            failed.append(result.is_error)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result.content[0].text})
        assert failed == [False, True]
        told = await client.chat.completions.create(model=model, messages=messages, tools=tools)
        assert "no station in Oslo" in told.choices[0].message.content
        made = await client.chat.completions.parse(model=model, messages=messages, tools=tools, response_format=Report)
    assert made.choices[0].message.parsed == Report(city="Paris", celsius=21)


async def test_anthropics_adapter(server):
    async with (
        Client(weather_station()) as station,
        anthropic.AsyncAnthropic(base_url=server, api_key="none", max_retries=0) as client,
    ):
        tools = [async_mcp_tool(tool, station) for tool in (await station.list_tools()).tools]
        asked = {"model": "actor", "max_tokens": 500, "messages": [QUESTION], "tools": tools}
        messages = [message async for message in client.beta.messages.tool_runner(**asked)]
    assert [message.stop_reason for message in messages] == ["tool_use", "end_turn"]
    assert "21 °C in Paris" in messages[-1].content[0].text
    assert "Error: " in messages[-1].content[0].text
    assert "no station in Oslo" in messages[-1].content[0].text

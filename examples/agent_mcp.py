"""An agent: a served model with the tools of an MCP server.

    octavo serve qwen3-8b
    python examples/agent_mcp.py "How many people live in Berlin and Paris together?"

Needs `pip install octavo[examples]`. Any MCP server that speaks stdio will do: --mcp says how to start it.
"""

import argparse
import asyncio
import json
import shlex
import sys
from pathlib import Path

from mcp import Client, StdioServerParameters
from mcp.types import Tool
from openai import AsyncOpenAI

OUR_SERVER = shlex.join([sys.executable, str(Path(__file__).with_name("mcp_server.py"))])
MAX_TURNS = 10


async def main() -> None:
    options = parse()
    command, *arguments = shlex.split(options.mcp)
    api = AsyncOpenAI(base_url=options.url, api_key=options.api_key)
    async with Client(StdioServerParameters(command=command, args=arguments)) as server:
        print(await answer(api, options.model, server, options.question))


async def answer(api: AsyncOpenAI, model: str, server: Client, question: str) -> str:
    """What the model says once it has called all the tools it wants."""
    tools = [as_function(tool) for tool in (await server.list_tools()).tools]
    messages: list = [{"role": "user", "content": question}]
    for _ in range(MAX_TURNS):
        reply = await api.chat.completions.create(model=model, messages=messages, tools=tools)
        message = reply.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            return message.content or ""
        for call in message.tool_calls:
            result = await run(server, call.function.name, call.function.arguments)
            print(f"{call.function.name}({call.function.arguments}) → {result}", file=sys.stderr)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return f"No answer after {MAX_TURNS} turns."


def as_function(tool: Tool) -> dict:
    """An MCP tool as OpenAI's API describes it."""
    function = {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema}
    return {"type": "function", "function": function}


async def run(server: Client, name: str, arguments: str) -> str:
    """The tool's result as text. What went wrong is a result too: the model can try again."""
    try:
        values = json.loads(arguments)
    except json.JSONDecodeError as error:
        return f"Error: the arguments are no JSON: {error}"
    result = await server.call_tool(name, values)
    text = "\n".join(part.text if part.type == "text" else f"[{part.type}]" for part in result.content)
    return f"Error: {text}" if result.is_error else text


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="An agent with the tools of an MCP server.")
    parser.add_argument("question")
    parser.add_argument("--url", default="http://localhost:8000/v1", help="the model's server")
    parser.add_argument("--model", default="qwen3-8b")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--mcp", default=OUR_SERVER, help="how to start the MCP server")
    return parser.parse_args()


if __name__ == "__main__":
    asyncio.run(main())

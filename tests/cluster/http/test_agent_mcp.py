"""examples/agent_mcp.py from end to end: a real MCP server over stdio, the official client and a listening server.

Only the model's words are made up.
"""

import asyncio
import dataclasses
import json
import sys
from pathlib import Path

from octavo.engine.text.byte_tokenizer import ByteTokenizer

AGENT = Path(__file__).parents[3] / "examples" / "agent_mcp.py"
TEMPLATE = """
{%- for tool in tools or [] %}{{ tool | tojson }}{% endfor %}
{%- for message in messages %}<|{{ message.role }}|>{{ message.content }}
    {%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}
{%- endfor %}<|assistant|>"""


def call(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


TURNS = (
    "I look them up.\n" + call("population", city="Paris") + "\n" + call("population", city="Rome"),
    call("population", city="Berlin"),
    call("add", numbers=[2103778, 3685265]),
    "5789043 people.",
)


async def test_an_agent_calls_tools_and_learns_from_an_error(harness):
    prompts = []

    def reply(request):
        prompts.append(ByteTokenizer().decode(request.prompt_token_ids, skip_special_tokens=False))
        return TURNS[len(prompts) - 1]

    info = dataclasses.replace(harness.info, max_model_len=16384)
    engine = harness.Client(reply_of=reply, step=16, info_value=info)
    with harness.server(engine, chat_template=TEMPLATE) as url:
        question = "How many people live in Paris and Rome together?"
        command = [sys.executable, str(AGENT), question, "--url", f"{url}/v1", "--model", "scripted"]
        pipe = asyncio.subprocess.PIPE
        agent = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
        async with asyncio.timeout(60):
            out, errors = await agent.communicate()
    assert agent.returncode == 0, errors.decode()
    assert out.decode().strip() == "5789043 people."
    first, second, third, last = prompts
    assert '"name": "population"' in first
    assert '"description": "The sum of numbers."' in first
    assert "<|assistant|>I look them up.<tool_call>" in second
    assert "<|tool|>2103778<|tool|>Error: " in second
    assert "Rome is not known here, but Berlin, Madrid, Paris are." in second
    assert third.endswith("<|tool|>3685265<|assistant|>")
    assert last.endswith("<|tool|>5789043.0<|assistant|>")

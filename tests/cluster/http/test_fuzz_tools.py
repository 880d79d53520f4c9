"""Tools, calls of earlier turns and answers of models that are nearly right: an answer or a 400, and nothing else."""

import asyncio
import dataclasses
import json

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo.cluster.ingress.reading.formats import CALL_FORMATS, THINKING

NAMES = st.sampled_from(["f", "g", "", "a b", "get_weather"])
JUNK = st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=4) | st.just([]) | st.just({})
TYPES = st.sampled_from(["object", "string", "integer", "array", "nothing", ["string", "null"]])
SCHEMAS = st.recursive(
    st.fixed_dictionaries({}, optional={"type": TYPES | JUNK, "enum": st.lists(JUNK, max_size=2), "pattern": JUNK})
    | JUNK,
    lambda inner: st.fixed_dictionaries(
        {},
        optional={
            "type": TYPES,
            "properties": st.dictionaries(NAMES, inner, max_size=2) | JUNK,
            "required": st.lists(NAMES, max_size=2) | JUNK,
            "anyOf": st.lists(inner, max_size=2) | JUNK,
            "items": inner | st.lists(inner, max_size=2),
            "$ref": st.sampled_from(["#", "#/properties/f", "nowhere"]) | JUNK,
            "additionalProperties": inner,
        },
    ),
    max_leaves=6,
)
FUNCTIONS = st.fixed_dictionaries(
    {"name": NAMES | st.just("f")},
    optional={"parameters": SCHEMAS, "strict": JUNK | st.booleans(), "description": JUNK},
)
TOOLS = st.lists(st.fixed_dictionaries({"type": st.just("function"), "function": FUNCTIONS}) | JUNK, max_size=3)
NAMED = st.builds(lambda name: {"type": "function", "function": {"name": name}}, NAMES)
ALLOWED = st.builds(
    lambda mode, tools: {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}},
    st.sampled_from(["auto", "required"]) | JUNK,
    st.lists(NAMED, max_size=2) | JUNK,
)
CHOICES = st.sampled_from(["auto", "none", "required"]) | NAMED | ALLOWED | JUNK
CALLS = st.lists(
    st.fixed_dictionaries(
        {"function": st.fixed_dictionaries({"name": NAMES}, optional={"arguments": st.just('{"a": 1}') | JUNK}) | JUNK},
        optional={"id": st.just("call_1") | JUNK, "type": JUNK | st.just("function"), "index": JUNK},
    ),
    max_size=2,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "tool", "function", "system"]), "content": st.just("Hi") | JUNK},
        optional={"tool_calls": CALLS | JUNK, "tool_call_id": JUNK, "name": JUNK, "function_call": JUNK},
    ),
    min_size=1,
    max_size=4,
)
BODIES = st.fixed_dictionaries(
    {"messages": MESSAGES | st.just([{"role": "user", "content": "Hi"}])},
    optional={
        "tools": TOOLS,
        "tool_choice": CHOICES,
        "functions": st.lists(FUNCTIONS, max_size=2),
        "function_call": JUNK,
        "parallel_tool_calls": st.booleans(),
        "stream": st.booleans(),
        "n": st.integers(1, 2),
        "response_format": st.sampled_from([{"type": "json_object"}, {"type": "text"}]),
        "reasoning_effort": st.sampled_from(["none", "high"]) | JUNK,
    },
)
WORDS = (
    *("<tool_call>", "</tool_call>", '{"name": "f", ', '"arguments": {', '"a": 1', "}", "[f(", ")]", "a=", "<think>"),
    *("</think>", "[TOOL_CALLS]", "f", "[ARGS]", "\n", "Hm. ", "functools[", "]", '"parameters": '),
)
REPLIES = st.lists(st.sampled_from(WORDS), max_size=10).map("".join)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=BODIES,
    reply=REPLIES,
    parser=st.sampled_from([None, *CALL_FORMATS]),
    reasoning=st.sampled_from([None, *THINKING]),
    step=st.integers(1, 20),
)
def test_any_tools(harness, body, reply, parser, reasoning, step):
    info = dataclasses.replace(harness.info, max_model_len=1 << 16)
    client = harness.Client(replies=(reply,), step=step, info_value=info)

    async def ask():
        async with (
            asyncio.timeout(10),
            harness.http(client, tool_call_parser=parser, reasoning_parser=reasoning) as http,
        ):
            response = await http.post("/v1/chat/completions", content=json.dumps(body).encode())
        assert response.status_code in (200, 400), response.text
        if response.status_code == 400:
            error = response.json()["error"]
            assert error["param"] is not None, error
        elif body.get("stream"):
            assert '"error"' not in response.text
            assert response.text.endswith("data: [DONE]\n\n")
        else:
            assert response.json()["choices"]

    asyncio.run(ask())

"""Structured output over HTTP, with the fake engine behind: bodies, their errors, and what hostile ones cost."""

import asyncio
import json
import logging
import re
import time

import httpx
import jsonschema
import pytest

from octavo.cluster.ingress import structured
from octavo.cluster.ingress.app import create_app
from octavo.cluster.ingress.client import LocalEngineClient
from octavo.cluster.ingress.service import Service
from octavo.cluster.ingress.settings import IngressSettings
from octavo.engine.build import build_engine
from octavo.engine.config import EngineConfig
from octavo.engine.loop import EngineLoop
from octavo.engine.text.byte_tokenizer import ByteTokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
TEXT = json.dumps(SCHEMA)
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def response_format(schema, **more):
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema, **more}}


@pytest.fixture(scope="module")
def engine():
    engine, loops = build_engine(EngineConfig(model="fake:step_ms=0.1")), []

    def start(on_deltas):
        loops.append(EngineLoop(engine.core, on_deltas))
        loops[0].start()
        return loops[0]

    yield LocalEngineClient(engine.info, start)
    loops[0].stop()


@pytest.fixture
async def http(engine):
    app = create_app([Service(IngressSettings(served_model_names=("fake",), created=1), engine, ByteTokenizer())])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://octavo", timeout=60) as http:
        yield http


async def idle(client):
    for _ in range(400):
        (stats,) = (await client.stats()).values()
        if stats.num_running == stats.num_waiting == stats.kv_blocks_held == 0:
            return
        await asyncio.sleep(0.005)
    raise AssertionError(f"the engine is still at work: {stats}")


async def answers(http, path, body, ends=("stop",)) -> list[str]:
    """The texts of all choices, streamed and whole; they agree."""
    ask = {"messages": [{"role": "user", "content": "Hi"}]} if path == CHAT else {"prompt": "Hi"}
    body = {**ask, "max_tokens": 200, "seed": 3, **body}
    whole = await http.post(path, json=body)
    assert whole.status_code == 200, whole.text
    choices = sorted(whole.json()["choices"], key=lambda choice: choice["index"])
    assert {choice["finish_reason"] for choice in choices} <= set(ends)
    texts = [choice["message"]["content"] if path == CHAT else choice["text"] for choice in choices]
    streamed = [""] * len(texts)
    async with http.stream("POST", path, json={**body, "stream": True}) as stream:
        async for line in stream.aiter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    streamed[choice["index"]] += (
                        (choice["delta"].get("content") or "") if path == CHAT else choice["text"]
                    )
    assert streamed == texts
    return texts


FULL = re.compile
WORD = {
    "type": "structural_tag",
    "format": {
        "type": "tag",
        "begin": "<n>",
        "content": {"type": "json_schema", "json_schema": {"type": "integer"}},
        "end": "</n>",
    },
}
FUNCTIONS = {
    "type": "structural_tag",
    "structures": [{"begin": "<function=f>", "schema": SCHEMA, "end": "</function>"}],
    "triggers": ["<function="],
}
# What is asked for, and what tells whether an answer has it.
FORMS = {
    "json_schema": ({"response_format": response_format(SCHEMA)}, SCHEMA),
    "json_object": ({"response_format": {"type": "json_object"}}, {"type": "object"}),
    "json": ({"structured_outputs": {"json": SCHEMA}}, SCHEMA),
    "json as text": ({"structured_outputs": {"json": TEXT, "disable_any_whitespace": True}}, SCHEMA),
    "a json object": ({"structured_outputs": {"json_object": True, "whitespace_pattern": " ?"}}, {"type": "object"}),
    "regex": ({"structured_outputs": {"regex": "[A-Z]{3}-[0-9]{2,4}"}}, FULL("[A-Z]{3}-[0-9]{2,4}")),
    "choice": ({"structured_outputs": {"choice": ["ja", "nein", 'say "no"', "✓"]}}, FULL('ja|nein|say "no"|✓')),
    "lark": ({"structured_outputs": {"grammar": 'start: "x" d+ "."\nd: /[0-9]/'}}, FULL(r"x[0-9]+\.")),
    "gbnf": ({"structured_outputs": {"grammar": 'root ::= "x" digit+ "."\ndigit ::= [0-9]'}}, FULL(r"x[0-9]+\.")),
    "structural tag": ({"structured_outputs": {"structural_tag": json.dumps(WORD)}}, FULL(r"<n>-?[0-9]+</n>")),
    "structural tag as a format": ({"response_format": WORD}, FULL(r"<n>-?[0-9]+</n>")),
    "guided_json": ({"guided_json": SCHEMA, "guided_decoding_backend": "xgrammar"}, SCHEMA),
    "guided_regex": ({"guided_regex": "(ab)+"}, FULL("(ab)+")),
    "guided_choice": ({"guided_choice": ["one", "two"]}, FULL("one|two")),
    "guided_grammar": ({"guided_grammar": 'start: "a" "b"*'}, FULL("ab*")),
    "guided_json_object": ({"guided_json_object": True, "guided_whitespace_pattern": ""}, {"type": "object"}),
}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("name", FORMS)
async def test_every_way_to_ask_for_a_form(http, path, name):
    asked, told = FORMS[name]
    for text in await answers(http, path, {**asked, "n": 2}):
        if isinstance(told, dict):
            jsonschema.validate(json.loads(text), told)
        else:
            assert told.fullmatch(text), text


async def test_tags_among_text(http):
    for text in await answers(
        http, CHAT, {"structured_outputs": {"structural_tag": FUNCTIONS}, "n": 2}, ("stop", "length")
    ):
        for call in re.findall("<function=f>(.*?)</function>", text):
            jsonschema.validate(json.loads(call), SCHEMA)


@pytest.mark.parametrize(
    "asked",
    [
        {"response_format": {"type": "text"}},
        {"response_format": None},
        {"structured_outputs": {}},
        {"guided_json": None},
    ],
)
async def test_what_asks_for_no_form_changes_nothing(http, asked):
    body = {"prompt": "Hi", "max_tokens": 20, "seed": 1}
    plain, same = [(await http.post(COMPLETIONS, json=b)).json()["choices"] for b in (body, {**body, **asked})]
    assert plain == same


async def test_the_old_names_are_reported_once(http, caplog):
    structured._warned.clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            await answers(http, COMPLETIONS, {"guided_choice": ["a", "b"]})
    assert sum("structured_outputs" in record.message for record in caplog.records) == 1


NESTED = {"type": "object", "properties": {"a/b": {"type": "array", "items": {"type": "string", "pattern": "(("}}}}
BAD = [
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "object with a schema"),
    ({"response_format": response_format(None)}, "response_format.json_schema.schema", "must be a JSON Schema"),
    ({"response_format": response_format({"type": "strin"})}, "response_format.json_schema.schema", "strin"),
    ({"response_format": response_format(NESTED)}, "response_format.json_schema.schema", "/properties/a~1b/items"),
    (
        {
            "response_format": response_format(
                {"$defs": {"x": {"uniqueItems": True, "type": "array"}}, "$ref": "#/$defs/x"}
            )
        },
        "response_format.json_schema.schema",
        "/$defs/x",
    ),
    (
        {"response_format": response_format({"$ref": "#/$defs/none"})},
        "response_format.json_schema.schema",
        "does not exist",
    ),
    ({"response_format": response_format(False)}, "response_format.json_schema.schema", "cannot be used"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "xml"),
    ({"response_format": {"type": "structural_tag"}}, "response_format", "structures must be a list"),
    ({"response_format": "json"}, "response_format", "object"),
    ({"structured_outputs": {"regex": "a(b"}}, "structured_outputs.regex", "unclosed group"),
    ({"structured_outputs": {"regex": "(?=a)b"}}, "structured_outputs.regex", "look-around"),
    ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex", "must be a string"),
    ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs.grammar", "1(8): unknown name"),
    ({"structured_outputs": {"grammar": "root ::= ("}}, "structured_outputs.grammar", "line 1"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least one"),
    ({"structured_outputs": {"choice": ["a", 1]}}, "structured_outputs.choice", "strings"),
    ({"structured_outputs": {"json": '{"a":'}}, "structured_outputs.json", "no JSON"),
    ({"structured_outputs": {"json": [1]}}, "structured_outputs.json", "string"),
    ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "structured_outputs", "json and regex are given"),
    ({"structured_outputs": {"disable_any_whitespace": True}}, "structured_outputs", "none is given"),
    ({"structured_outputs": {"jsn": {}}}, "structured_outputs.jsn", "no field"),
    (
        {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": 1}},
        "structured_outputs.disable_any_whitespace",
        "true or false",
    ),
    (
        {"structured_outputs": {"json": SCHEMA}, "response_format": {"type": "json_object"}},
        "structured_outputs",
        "together",
    ),
    ({"guided_json": {"type": "strin"}}, "guided_json", "guided_json cannot be used"),
    ({"guided_regex": "a(b"}, "guided_regex", "unclosed group"),
    ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "together"),
    ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided", "together"),
    ({"structured_outputs": {"json": {"enum": []}}}, "structured_outputs.json", "cannot be used"),
]


@pytest.mark.parametrize(("asked", "param", "message"), BAD, ids=str)
async def test_what_cannot_be_used_is_a_400_that_says_where(http, asked, param, message):
    for path, ask in ((CHAT, {"messages": [{"role": "user", "content": "Hi"}]}), (COMPLETIONS, {"prompt": "Hi"})):
        reply = await http.post(path, json={**ask, **asked, "stream": path == CHAT})
        error = reply.json()["error"]
        assert (reply.status_code, error["param"]) == (400, param), error
        assert message in error["message"]


async def test_a_tool_whose_parameters_are_no_schema_is_named(http):
    tools = [
        {"type": "function", "function": {"name": name, "parameters": schema}}
        for name, schema in (
            ("a", SCHEMA),
            ("b", {"type": "object", "properties": {"x": {"type": "string", "pattern": "(("}}}),
        )
    ]
    body = {"messages": [{"role": "user", "content": "Hi"}], "tools": tools, "tool_choice": "required"}
    reply = await http.post(CHAT, json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "tools[1].function.parameters")
    assert "/properties/x" in reply.json()["error"]["message"]


def chain(length):
    links = {f"d{i}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": {**links, f"d{length}": {"type": "null"}}}


HOSTILE = {
    "nested": {"json": '{"type":"array","items":' * 20_000 + "{}" + "}" * 20_000},
    "a chain of definitions": {"json": json.dumps(chain(12_000))},
    "a circle of definitions": {"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}},
    "all of any of": {
        "json": {"allOf": [{"anyOf": [{"properties": {f"p{i}_{j}": {}}} for j in range(10)]} for i in range(10)]}
    },
    "many names": {"json": {"enum": [f"value {i}" for i in range(30_000)]}},
    "many properties": {"json": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(3000)}}},
    "repeated": {"regex": "((a{1000}){1000}){1000}"},
    "repeated later": {"regex": "a long beginning of the text ((a{1000}){1000}){1000}"},
    "doubled states": {"regex": "(a|b)*a(a|b){25}"},
    "parentheses": {"regex": "(" * 100_000 + "a" + ")" * 100_000},
    "long": {"regex": "a" * 1_000_000},
    "doubled rules": {
        "grammar": "start: R0\n" + "\n".join(f"R{i}: R{i + 1} R{i + 1}" for i in range(40)) + '\nR40: "a"'
    },
    "ambiguous": {"grammar": 'start: s\ns: s s s | s s | "a" |'},
    "nested rules": {"grammar": "start: " + "(" * 100_000 + '"a"' + ")" * 100_000},
    "nested gbnf": {"grammar": "root ::= " + "(" * 5000 + '"a"' + ")" * 5000},
    "too long": {"grammar": "start: /a/" + " " * (1 << 20)},
}


async def test_hostile_forms_cost_little_and_others_are_served_meanwhile(http, engine):
    slowest, done = 0.0, False

    async def others():
        nonlocal slowest
        while not done:
            began = time.monotonic()
            reply = await http.post(COMPLETIONS, json={"prompt": "Hi", "max_tokens": 2})
            slowest = max(slowest, time.monotonic() - began)
            assert reply.status_code == 200

    serving = asyncio.create_task(others())
    began = time.monotonic()
    replies = await asyncio.gather(
        *(
            http.post(COMPLETIONS, json={"prompt": "Hi", "max_tokens": 60, "structured_outputs": form})
            for form in HOSTILE.values()
        )
    )
    took, done = time.monotonic() - began, True
    await serving
    assert {
        name: reply.status_code
        for name, reply in zip(HOSTILE, replies, strict=True)
        if reply.status_code not in (200, 400)
    } == {}
    assert took < 20
    assert slowest < 3
    await idle(engine)


async def test_a_client_that_leaves_while_its_form_is_compiled_leaves_nothing(http, engine):
    schema = {"type": "object", "properties": {f"q{i}": {"type": "string"} for i in range(300)}}
    for _ in range(3):
        asking = asyncio.create_task(
            http.post(COMPLETIONS, json={"prompt": "Hi", "structured_outputs": {"json": schema}})
        )
        await asyncio.sleep(0.02)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    await idle(engine)
    await answers(http, COMPLETIONS, {"structured_outputs": {"json": schema, "disable_additional_properties": True}})

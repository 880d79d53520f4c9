"""Grammars of enforced calls, with llguidance over bytes: what they let through is what the readers read as calls."""

import json
import random

import pytest
from jsonschema import validate
from llguidance import LLMatcher, LLTokenizer

from octavo.cluster.ingress.protocol import ChatBody, body_of
from octavo.cluster.ingress.reading.formats import CALL_FORMATS, NAME
from octavo.cluster.ingress.reading.parts import Answer, CallArguments, CallBegun
from octavo.cluster.ingress.tool_grammar import form_of_calls
from octavo.cluster.ingress.tools import tools_of
from octavo.engine.grammar.spec import StructuredOutputs

BYTES = LLTokenizer("byte")
COLOR = {"$ref": "#/$defs/color"}
SCHEMAS = {
    "paint": {
        "type": "object",
        "properties": {"color": COLOR, "coats": {"type": "integer", "minimum": 1, "maximum": 3}},
        "required": ["color", "coats"],
        "additionalProperties": False,
        "$defs": {"color": {"enum": ["red", "grün"]}},
    },
    "stop": {"type": "object", "properties": {}, "additionalProperties": False},
}
SHAPED = sorted(name for name, each in CALL_FORMATS.items() if each.shape is not None and each.name == name)
TRIGGERED = sorted(name for name in SHAPED if CALL_FORMATS[name].trigger)
ANSWER = {"type": "object", "properties": {"done": {"type": "boolean"}}, "required": ["done"]}


def tools(choice="required", strict=False, **body):
    given = [
        {"type": "function", "function": {"name": name, "parameters": schema, "strict": strict}}
        for name, schema in SCHEMAS.items()
    ]
    return tools_of(body_of(ChatBody, {"messages": [], "tools": given, "tool_choice": choice, **body}))


def grammar(name, offered, answer=None, special_id=lambda text: None):
    form = form_of_calls(offered, CALL_FORMATS[name], special_id, answer)
    return form.grammar if form.kind == "grammar" else LLMatcher.grammar_from_json_schema(form.json)


def write(name, calls):
    shape = CALL_FORMATS[name].shape
    texts = [shape.begin.replace(NAME, called) + arguments + shape.end for called, arguments in calls]
    return shape.first + shape.between.join(texts) + shape.last


def takes(source, text):
    """Whether the grammar lets `text` through, as all there is."""
    matcher = LLMatcher(BYTES, source)
    assert not matcher.is_error(), matcher.get_error()
    tokens = BYTES.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def random_text(source, seed):
    """A walk through the grammar, one byte after the other, to a place where it may end."""
    draw, matcher, found = random.Random(seed), LLMatcher(BYTES, source), b""
    while not matcher.is_stopped():
        allowed = [token for token, bias in enumerate(matcher.compute_logit_bias()) if bias]
        token = draw.choice(allowed)
        matcher.consume_token(token)
        if token == BYTES.eos_token:
            break
        found += bytes([token])
    return found.decode()


def read(name, text):
    parts = CALL_FORMATS[name].reader(SCHEMAS).push(text, True)
    called = [[part.name, ""] for part in parts if isinstance(part, CallBegun)]
    for part in parts:
        if isinstance(part, CallArguments):
            called[part.index][1] += part.text
    return called, "".join(part.text for part in parts if isinstance(part, Answer))


@pytest.mark.parametrize("name", SHAPED)
def test_every_output_is_calls_that_keep_to_their_schemas(name):
    required = grammar(name, tools())
    for seed in range(4):
        called, text = read(name, random_text(required, seed))
        assert called
        assert not text.strip()
        for tool, arguments in called:
            validate(json.loads(arguments), SCHEMAS[tool])


@pytest.mark.parametrize("name", SHAPED)
def test_what_is_let_through(name):
    paint, stop = ("paint", '{"color": "grün", "coats": 2}'), ("stop", "{}")
    required, single = grammar(name, tools()), grammar(name, tools(parallel_tool_calls=False))
    named = grammar(name, tools({"type": "function", "function": {"name": "paint"}}))
    assert takes(required, write(name, [paint]))
    assert takes(required, "\n" + write(name, [paint, stop, paint]))
    assert takes(single, write(name, [stop]))
    assert takes(named, write(name, [paint]))
    for source, calls in ((single, [stop, stop]), (named, [stop]), (named, [paint, paint])):
        assert not takes(source, write(name, calls))
    for wrong in ('{"color": "blue", "coats": 2}', '{"color": "red"}', "[]", '{"color":"red", "coats": 2}'):
        assert not takes(required, write(name, [("paint", wrong)]))
    assert not takes(required, "Sure.")
    assert not takes(required, write(name, [("sand", "{}")]))


@pytest.mark.parametrize("name", SHAPED)
def test_calls_or_an_answer_of_its_own_form(name):
    source = grammar(name, tools("auto"), StructuredOutputs(json=json.dumps(ANSWER)))
    assert takes(source, '{"done": true}')
    assert takes(source, write(name, [("stop", "{}")]))
    assert not takes(source, '{"done": 1}')
    assert not takes(source, "Done.")
    assert takes(grammar(name, tools("auto"), StructuredOutputs(json_object=True)), '{"any": 1}')


@pytest.mark.parametrize("name", TRIGGERED)
def test_strict_tools_leave_text_free_but_not_calls(name):
    source = grammar(name, tools("auto", strict=True))
    good = write(name, [("paint", '{"color": "red", "coats": 1}')])
    assert takes(source, "No calls at all.")
    assert takes(source, good)
    assert takes(source, f"Let me <see>.\n{good}")
    assert not takes(source, write(name, [("paint", '{"color": "blue", "coats": 1}')]))
    assert not takes(source, write(name, [("sand", "{}")]))


def test_special_tokens_are_named_by_their_ids():
    ids = {"[TOOL_CALLS]": 7, "[ARGS]": 8}
    source = grammar("mistral", tools(), special_id=ids.get)
    assert "[TOOL_CALLS]" not in source
    matcher = LLMatcher(BYTES, source)
    assert matcher.try_consume_tokens([7, *BYTES.tokenize_str('[{"name": "stop", "arguments": {}}]')]) > 30
    assert matcher.is_accepting()


def test_a_special_token_may_begin_calls_in_text():
    source = grammar("mistral", tools("auto", strict=True), special_id={"[TOOL_CALLS]": 7}.get)
    good, bad = '[{"name": "stop", "arguments": {}}]', '[{"name": "sand", "arguments": {}}]'
    for call, fits in ((good, True), (bad, False)):
        tokens = [*BYTES.tokenize_str("Wait.\n"), 7, *BYTES.tokenize_str(call)]
        matcher = LLMatcher(BYTES, source)
        assert (matcher.try_consume_tokens(tokens) == len(tokens)) == fits
    assert takes(source, "No calls at all.")


def test_keywords_that_no_grammar_has_are_left_to_the_tool():
    schema = {"type": "object", "properties": {"a": {"type": "string", "format": "uri-template"}, "b": {"not": {}}}}
    offered = tools_of(
        body_of(
            ChatBody,
            {
                "messages": [],
                "tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}],
                "tool_choice": "required",
            },
        )
    )
    assert takes(grammar("hermes", offered), write("hermes", [("f", '{"a": "x"}')]))


def test_what_is_not_enforced():
    assert form_of_calls(tools("auto"), CALL_FORMATS["hermes"], lambda text: None, None) is None
    regex = StructuredOutputs(regex="a+")
    assert form_of_calls(tools("auto"), CALL_FORMATS["hermes"], lambda text: None, regex) is regex
    assert form_of_calls(tools("auto", strict=True), CALL_FORMATS["llama3_json"], lambda text: None, None) is None

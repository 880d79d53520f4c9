"""Every notation of tool calls: what is written is what is read, however it is cut, and no text is ever lost."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.cluster.ingress.reading.deepseek import BEGIN, END, FIRST, LAST, SEPARATOR
from octavo.cluster.ingress.reading.formats import CALL_FORMATS
from octavo.cluster.ingress.reading.parts import Answer, CallArguments, CallBegun, PlainReader
from octavo.cluster.ingress.reading.tape import merge

OFFER = {
    "get_weather": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "any": {}},
    },
    "now": {"type": "object", "properties": {}},
}
NAMES = ("get_weather", "now")

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5)
arguments = st.fixed_dictionaries({}, optional={"city": st.text(), "days": st.integers(), "any": values})
calls = st.lists(st.tuples(st.sampled_from(NAMES), arguments), min_size=1, max_size=3)
prose = st.sampled_from(["", "Let me look.", "a < b, [x] and {y}\n", "Grüße 🎉"])
cuts = st.lists(st.integers(0, 400), max_size=12)


def dumps(value):
    return json.dumps(value, ensure_ascii=False)


def hermes(calls):
    return "\n".join(f'<tool_call>\n{{"name": "{n}", "arguments": {dumps(a)}}}\n</tool_call>' for n, a in calls)


def json_list(key):
    return lambda calls: "[" + ", ".join(f'{{"name": "{n}", "{key}": {dumps(a)}}}' for n, a in calls) + "]"


def python(value):
    match value:
        case list():
            return "[" + ", ".join(map(python, value)) + "]"
        case dict():
            return "{" + ", ".join(f"{k!r}: {python(v)}" for k, v in value.items()) + "}"
    return repr(value)


def pythonic(calls):
    return "[" + ", ".join(f"{n}({', '.join(f'{k}={python(v)}' for k, v in a.items())})" for n, a in calls) + "]"


def xml(calls):
    def value(v):
        return v if isinstance(v, str) else dumps(v)

    def one(name, args):
        inner = "".join(f"<parameter={k}>\n{value(v)}\n</parameter>\n" for k, v in args.items())
        return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"

    return "\n".join(one(*call) for call in calls)


def deepseek(one):
    return lambda calls: FIRST + "\n".join(BEGIN + one(n, dumps(a)) + END for n, a in calls) + LAST


WRITERS = {
    "hermes": hermes,
    "json_list": json_list("parameters"),
    "llama3_json": lambda calls: "; ".join(f'{{"name": "{n}", "parameters": {dumps(a)}}}' for n, a in calls),
    "pythonic": pythonic,
    "mistral": lambda calls: "[TOOL_CALLS]" + json_list("arguments")(calls),
    "phi4_mini_json": lambda calls: "functools" + json_list("arguments")(calls),
    "qwen3_coder": xml,
    "deepseek_v3": deepseek(lambda name, args: f"function{SEPARATOR}{name}\n```json\n{args}\n```"),
    "deepseek_v31": deepseek(lambda name, args: f"{name}{SEPARATOR}{args}"),
}
formats = pytest.mark.parametrize("name", WRITERS)


def plain(parts):
    """Without ids, which are random."""
    return [(part.index, part.name) if isinstance(part, CallBegun) else part for part in merge(parts)]


def read(name, text, at=()):
    reader = CALL_FORMATS[name].reader(OFFER)
    bounds = [0, *sorted(min(cut, len(text)) for cut in at), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(bounds)]
    return [part for i, piece in enumerate(pieces) for part in reader.push(piece, i == len(pieces) - 1)]


def said(parts):
    return "".join(part.text for part in parts if isinstance(part, Answer))


def called(parts):
    result = [[part.name, ""] for part in parts if isinstance(part, CallBegun)]
    for part in parts:
        if isinstance(part, CallArguments):
            result[part.index][1] += part.text
    return result


def test_every_parser_is_written_here():
    assert {CALL_FORMATS[name].reader for name in WRITERS} == {
        each.reader for each in CALL_FORMATS.values() if each.name != "none"
    }


@formats
@settings(max_examples=40, deadline=None)
@given(before=prose, wanted=calls, cuts=cuts)
def test_what_is_written_is_read(name, before, wanted, cuts):
    if name == "qwen3_coder":
        # Its values are text: what they are, only a schema tells, and a closing tag in them looks like one that closes.
        known = {each: OFFER[each]["properties"].keys() - {"any"} for each in NAMES}
        wanted = [(n, {k: v for k, v in a.items() if k in known[n] and "<" not in str(v)}) for n, a in wanted]
    text = before + ("\n" if before else "") + WRITERS[name](wanted)
    parts = read(name, text, cuts)
    assert [(n, json.loads(a)) for n, a in called(parts)] == wanted
    assert said(parts) == before.rstrip()
    assert plain(parts) == plain(read(name, text))


def damaged(name):
    """Calls with a character taken out, put in or cut off at, or several writers' fragments in a row."""

    def damage(wanted, at, how):
        text = "Well.\n" + WRITERS[name](wanted)
        at %= len(text)
        return {"cut": text[:at], "out": text[:at] + text[at + 1 :]}.get(how, text[:at] + how + text[at:])

    broken = st.builds(damage, calls, st.integers(0), st.sampled_from(["cut", "out", *'"{}[]<,:\\\n x', "<tool_call>"]))
    fragments = st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join)
    return broken | fragments


FRAGMENTS = (
    *(
        "<tool_call>",
        "</tool_call>",
        '{"name": ',
        '"now"',
        ', "arguments": ',
        '"parameters": ',
        "{",
        "}",
        "[",
        "]",
        "\n",
    ),
    *(
        "functools",
        "[TOOL_CALLS]",
        "<|python_tag|>",
        "<function=",
        "now",
        ">",
        "(",
        ")",
        "a=",
        "1",
        "'b'",
        ", ",
        "[ARGS]",
    ),
    *(
        FIRST,
        BEGIN,
        SEPARATOR,
        END,
        LAST,
        '{"name": "now", "arguments": {}}',
        "now()",
        "now[ARGS]{}",
        "function",
        "tru",
    ),
)


@formats
@settings(max_examples=60, deadline=None)
@given(data=st.data(), cuts=cuts)
def test_nonsense_is_text_and_cuts_do_not_matter(name, data, cuts):
    text = data.draw(damaged(name))
    whole, cut = read(name, text), read(name, text, cuts)
    assert plain(cut) == plain(whole)
    assert plain(read(name, text, range(len(text)))) == plain(whole)
    if not called(whole):
        assert said(whole) == text
    assert all(tool and args.startswith("{") for tool, args in called(whole))


@formats
@settings(max_examples=15, deadline=None)
@given(text=st.text(), cuts=cuts)
def test_text_without_calls_is_kept(name, text, cuts):
    assert said(read(name, text, cuts)) == text


def test_the_plain_reader_reads_text():
    assert PlainReader().push("<tool_call>", False) == [Answer("<tool_call>")]
    assert PlainReader().push("", True) == []


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        # arguments before the name, as text, and not at all
        ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', [["f", '{"a": 1}']]),
        ("hermes", r'<tool_call>{"name": "f", "arguments": "{\"a\": 1}"}</tool_call>', [["f", '{"a": 1}']]),
        ("hermes", '<tool_call>{"name": "f"}</tool_call>', [["f", "{}"]]),
        ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', [["f", "{}"]]),
        # a bracket too few, a bracket too many, no closing tag, a list
        ("hermes", '<tool_call>{"name": "f", "arguments": {}\n</tool_call>', [["f", "{}"]]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}}}\n</tool_call>', [["f", "{}"]]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}}', [["f", "{}"]]),
        ("hermes", '<tool_call>[{"name": "f", "arguments": {}}]</tool_call>', [["f", "{}"]]),
        # line ends and backslashes as models write them
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "x\n\\d"}}</tool_call>', [["f", '{"a": "x\\n\\\\d"}']]),
        # cut off inside the arguments: they stay unfinished
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": [1, tr', [["f", '{"a": [1, tr']]),
        # cut off in what comes behind a call: in its notation, in the mark of another, in its name
        ("hermes", '<tool_call>{"name": "f", "arguments": {}}\n</tool', [["f", "{}"]]),
        ("hermes", hermes([("f", {})]) + "\n<tool_", [["f", "{}"]]),
        ("hermes", hermes([("f", {})]) + '\n<tool_call>\n{"na', [["f", "{}"]]),
        ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {}}, {"na', [["f", "{}"]]),
        ("llama3_json", '<|python_tag|>{"type": "function", "name": "now", "parameters": {}}', [["now", "{}"]]),
        ("mistral", '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g{}', [["f", '{"a": 1}'], ["g", "{}"]]),
        ("mistral", "[TOOL_CALLS]f[CALL_ID]abc[ARGS]{}", [["f", "{}"]]),
        ("phi4_mini_json", '<|tool_call|>[{"name": "f", "arguments": {}}]<|/tool_call|>', [["f", "{}"]]),
        ("pythonic", "<|python_start|>[now(), now(a='x',)]<|python_end|>", [["now", "{}"], ["now", '{"a": "x"}']]),
        (
            "pythonic",
            "[now(a=[True, None, -1.5,], b={'k': (1,)})]",
            [["now", '{"a": [true, null, -1.5], "b": {"k": [1]}}']],
        ),
        (
            "qwen3_coder",
            "<function=get_weather><parameter=city>\n12\n\n</parameter><parameter=days>2</parameter></function>",
            [["get_weather", '{"city": "12\\n", "days": 2}']],
        ),
    ],
)
def test_how_models_really_write(name, text, expected):
    parts = read(name, text)
    assert called(parts) == expected
    assert said(parts) == ""


@pytest.mark.parametrize("text", ['{"name": "Ann", "parameters": {}}', 'As in {"name": "now", "parameters": {}}'])
def test_json_that_is_an_answer_is_no_call_where_nothing_marks_calls(text):
    assert read("llama3_json", text) == [Answer(text)]


def test_what_comes_after_broken_arguments_is_text():
    parts = read("pythonic", "[now(a=[1, 0x])]")
    assert (said(parts), called(parts)) == ("0x])]", [["now", '{"a": [1, ']])
    parts = read("hermes", 'So: <tool_call>{"name": "f", "arguments": {"a": oops}}</tool_call>')
    assert (said(parts), called(parts)) == ("So:oops}}</tool_call>", [["f", '{"a": ']])


def test_arguments_stream_as_they_are_written():
    reader = CALL_FORMATS["hermes"].reader(OFFER)
    assert reader.push('Hm.\n<tool_call>{"name": "now", "argu', False) == [Answer("Hm.")]
    begun, first = reader.push('ments": {"city": "Kö', False)
    assert (begun.name, first) == ("now", CallArguments(0, '{"city": "Kö'))
    assert reader.push("ln", False) == [CallArguments(0, "ln")]
    assert reader.push('"}}</tool', False) == [CallArguments(0, '"}')]
    assert reader.push("_call>", True) == []


def test_json_of_the_answers_own_streams_where_nothing_marks_calls():
    reader = CALL_FORMATS["llama3_json"].reader(OFFER)
    assert reader.push('{"title": "A lo', False) == [Answer('{"title": "A lo')]
    assert reader.push('ng story"}', True) == [Answer('ng story"}')]


def test_text_behind_a_call():
    assert said(read("hermes", hermes([("now", {})]) + "\n\nThat was it. ")) == "That was it. "
    assert said(read("hermes", "Well.\n" + hermes([("now", {})]) + "\n\nThat was it.")) == "Well.\n\nThat was it."


def test_ids_are_unique_and_mistrals_are_short():
    parts = read("hermes", hermes([("now", {}), ("now", {})]))
    assert len({part.call_id for part in parts if isinstance(part, CallBegun)}) == 2
    (begun, _) = read("mistral", "[TOOL_CALLS]now{}")
    assert len(begun.call_id) == 9
    assert begun.call_id.isalnum()


def test_nesting_and_length_cost_no_stack():
    deep = "[" * 20_000
    for name, text in (("hermes", '<tool_call>{"name": "f", "arguments": {"a": '), ("pythonic", "[now(a=")):
        assert called(read(name, text + deep))[0][1].endswith(deep)
    text = f'<tool_call>{{"name": "f", "arguments": "{{\\"a\\": {deep}"}}</tool_call>'
    assert read("hermes", text) == [Answer(text)]
    text = f"<function=get_weather><parameter=days>{deep}</parameter></function>"
    assert called(read("qwen3_coder", text)) == [["get_weather", json.dumps({"days": deep})]]

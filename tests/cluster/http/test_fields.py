"""Every field of the two bodies: what it does when it is right, and that it is named when it is wrong.

A field that is added to a body, or to the lists of what is refused or has no effect, must be added here and in
docs/api.md.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from octavo.cluster.ingress.protocol import NOT_YET, WITHOUT_EFFECT, ChatBody, CompletionBody
from octavo.engine.beam import Beams
from octavo.engine.grammar.spec import StructuredOutputs

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PATHS = {CHAT: ChatBody, TEXT: CompletionBody}
HI = [{"role": "user", "content": "Hi"}]
SCHEMA = {"type": "object"}
TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}
TEMPLATE = "{% for m in messages %}[{{ m.content }}]{% endfor %}{{ documents }}{{ extra }}{{ add_generation_prompt }}"


@dataclass
class Field:
    """`good`: a value; `effect(request, reply)`: whether it is seen in what the engine was asked, or in the reply.
    `bad`: values that are a 400. also: fields sent along. on: the paths that have it."""

    good: Any
    effect: Callable[[Any, Any], bool] | None = None
    bad: tuple[Any, ...] = ()
    also: dict[str, Any] = field(default_factory=dict)
    on: tuple[str, ...] = (CHAT, TEXT)


def param(name: str, value: Any, sent: Any = None, *bad: Any, **more: Any) -> Field:
    """A field that is the sampling parameter of the same name."""
    return Field(value if sent is None else sent, lambda r, _: getattr(r.params, name) == value, bad, **more)


def choice(reply: Any) -> Any:
    return reply["choices"][0]


def text_of(reply: Any) -> str:
    return choice(reply)["text"] if "text" in choice(reply) else choice(reply)["message"]["content"]


def prompt_of(request: Any) -> str:
    return bytes(token for token in request.prompt_token_ids if token < 256).decode()


FLAG = (1, "true", [], {})
INTEGER = ("1", 1.5, True, [1], {})
NUMBER = ("1", True, [1], {})
STRING = (5, True, ["x"], {})
IDS = (5, "5", [1.5], ["1"], [-1], [10**6], [True], {})
FIELDS: dict[str, Field] = {
    "model": Field("other-name", lambda r, b: b["model"] == "scripted", (5, [])),
    "messages": Field(
        HI, lambda r, _: "Hi" in prompt_of(r), ("Hi", [], [5], [{"role": "x", "content": ""}]), on=(CHAT,)
    ),
    "prompt": Field(
        [72, 105], lambda r, _: r.prompt_token_ids == (72, 105), (5, [], [1.5], [[]], [-1], {}), on=(TEXT,)
    ),
    "stream": Field(True, lambda _, b: b["object"].endswith("chunk") or "text" in choice(b), FLAG),
    "stream_options": Field(
        {"include_usage": True, "continuous_usage_stats": True},
        lambda _, b: b["usage"]["prompt_tokens"] > 0,
        ("x", [], {"include_usage": 1}, {"continuous_usage_stats": "x"}),
        {"stream": True},
    ),
    "stream_interval": Field(100, lambda _, b: b is not None, (*INTEGER, 0, -1), {"stream": True}),
    "n": Field(3, lambda r, b: r.params.n == len(b["choices"]) == 3, (*INTEGER, 0, -1, 10**6, 10**30)),
    "best_of": Field(2, lambda r, b: r.params.n == 2, (*INTEGER, 3), {"n": 2}, on=(TEXT,)),
    "suffix": Field("", lambda r, b: True, (5, "end"), on=(TEXT,)),
    "temperature": param("temperature", 0.25, None, *NUMBER, -0.1, 1e400),
    "top_p": param("top_p", 0.5, None, *NUMBER, 0, 1.1, -1),
    "top_k": param("top_k", 7, None, *INTEGER, -2),
    "min_p": param("min_p", 0.5, None, *NUMBER, -0.1, 1.1),
    "presence_penalty": param("presence_penalty", 1.5, None, *NUMBER, 2.1, -2.1),
    "frequency_penalty": param("frequency_penalty", -1.5, None, *NUMBER, 2.1, -2.1),
    "repetition_penalty": param("repetition_penalty", 1.5, None, *NUMBER, 0, -1),
    "seed": param("seed", 7, None, *INTEGER, 2**63, -(2**63) - 1),
    "stop": Field(
        "lo", lambda r, b: text_of(b) == "Hel" and choice(b)["stop_reason"] == "lo", (5, "", [""], ["a", 1], {})
    ),
    "stop_token_ids": param("stop_token_ids", (5, 6), [5, 6], *IDS),
    "include_stop_str_in_output": Field(True, lambda _, b: text_of(b) == "Hello", FLAG, {"stop": ["lo"]}),
    "ignore_eos": param("ignore_eos", True, None, *FLAG),
    "max_tokens": Field(
        3, lambda r, b: r.params.max_tokens == 3 and text_of(b) == "Hel", (*INTEGER, 0, -1, 10**9, 10**30)
    ),
    "max_completion_tokens": Field(4, lambda r, b: r.params.max_tokens == 4, (*INTEGER, 0, -1, 10**9), on=(CHAT,)),
    "min_tokens": param("min_tokens", 5, None, *INTEGER, -1, 10**9),
    "skip_special_tokens": param("skip_special_tokens", False, None, *FLAG),
    "spaces_between_special_tokens": param("spaces_between_special_tokens", False, None, *FLAG),
    "logit_bias": Field(
        {"5": 1.5}, lambda r, _: r.params.logit_bias == {5: 1.5},
        (5, [1], {"x": 1}, {"-1": 1}, {"5": "x"}, {"10000": 1}, {"1_0": 1}),
    ),
    "allowed_token_ids": param("allowed_token_ids", (65, 66), [65, 66], *IDS, []),
    "bad_words": Field(["bad"], lambda r, _: (98, 97, 100) in r.bad_words_token_ids, (5, "bad", [""], [" "], [5], {})),
    "prompt_logprobs": Field(
        2, lambda r, b: len((b if "prompt_logprobs" in b else choice(b))["prompt_logprobs"]) == len(r.prompt_token_ids),
        (*INTEGER, -1, 21),
    ),
    "top_logprobs": Field(
        2, lambda r, b: len(choice(b)["logprobs"]["content"][0]["top_logprobs"]) == 2, (*INTEGER, -1, 21),
        {"logprobs": True}, (CHAT,),
    ),
    "logprob_token_ids": Field(
        [65, 66], lambda r, b: r.params.logprob_token_ids == (65, 66) and '"B"' in json.dumps(choice(b)["logprobs"]),
        IDS, {"logprobs": 1},
    ),
    "truncate_prompt_tokens": Field(
        3, lambda r, _: len(r.prompt_token_ids) == 3, (*INTEGER, 0, -2, 10**9), {"truncation_side": "right"}
    ),
    "truncation_side": Field(
        "right", lambda r, _: r.prompt_token_ids[0] in (60, 256), ("up", 5, []), {"truncate_prompt_tokens": 4}
    ),
    "add_special_tokens": Field(True, lambda r, _: 256 in r.prompt_token_ids, FLAG),
    "echo": Field(True, lambda r, b: text_of(b).startswith("Hi"), FLAG,
                  {"messages": [*HI, {"role": "assistant", "content": "Hi"}], "continue_final_message": True}),
    "priority": Field(-3, lambda r, _: r.priority == -3, (*INTEGER, 2**31, -(2**31))),
    "cache_salt": Field("s", lambda r, _: r.cache_salt == "s", (*STRING, "", "x" * 300)),
    "request_id": Field(
        "mine", lambda r, b: b["id"].endswith("-mine") and "mine" in r.request_id, (*STRING, "", "x" * 300)
    ),
    "session_id": Field("s", lambda r, _: r.session_id == "s", (*STRING, "", "x" * 300)),
    "return_token_ids": Field(True, lambda r, b: choice(b)["token_ids"][:2] == [72, 101], FLAG),
    "return_tokens_as_token_ids": Field(
        True, lambda r, b: "token_id:72" in json.dumps(choice(b)["logprobs"]), FLAG, {"logprobs": 1}
    ),
    "return_prompt_text": Field(
        True, lambda r, b: "Hi" in (b["prompt_text"] if "prompt_text" in b else choice(b)["prompt_text"]), FLAG
    ),
    "use_beam_search": Field(True, lambda r, _: r.params.beams == Beams(2), FLAG, {"n": 2}),
    "beam_width": Field(
        4, lambda r, _: (r.params.beams, r.params.n) == (Beams(4), 2), INTEGER, {"use_beam_search": True, "n": 2}
    ),
    "length_penalty": Field(
        0.5, lambda r, _: r.params.beams == Beams(1, 0.5), (*NUMBER, 1e300), {"use_beam_search": True}
    ),
    "early_stopping": Field(
        "never", lambda r, _: r.params.beams == Beams(1, 1.0, "never"), (1, "x", []), {"use_beam_search": True}
    ),
    "add_generation_prompt": Field(
        False, lambda r, _: not prompt_of(r).rstrip().endswith("assistant"), FLAG, on=(CHAT,)
    ),
    "continue_final_message": Field(
        True, lambda r, _: prompt_of(r).endswith("Sure"), FLAG,
        {"messages": [*HI, {"role": "assistant", "content": "Sure"}]}, (CHAT,),
    ),
    "chat_template": Field(TEMPLATE, lambda r, _: prompt_of(r).startswith("[Hi]"), (*STRING, "{% if %}"), on=(CHAT,)),
    "chat_template_kwargs": Field(
        {"extra": "more"}, lambda r, _: "more" in prompt_of(r), (5, "x", [], {"messages": []}),
        {"chat_template": TEMPLATE}, (CHAT,),
    ),
    "documents": Field(
        [{"title": "Doc"}], lambda r, _: "Doc" in prompt_of(r), (5, "x", {}, ["x"]),
        {"chat_template": TEMPLATE}, (CHAT,),
    ),
    "tools": Field([TOOL], None, (5, "x", {}, [5], [{}], [{"type": "magic"}]), on=(CHAT,)),
    "tool_choice": Field("none", None, (5, "always", [], {"type": "function"}), {"tools": [TOOL]}, (CHAT,)),
    "parallel_tool_calls": Field(False, None, FLAG, on=(CHAT,)),
    "functions": Field([TOOL["function"]], None, (5, "x", [{}]), on=(CHAT,)),
    "function_call": Field("none", None, ("always", 5), on=(CHAT,)),
    "include_reasoning": Field(False, None, FLAG, on=(CHAT,)),
    "reasoning_effort": Field("low", None, ("much", 5), on=(CHAT,)),
    "response_format": Field(
        {"type": "json_object"}, lambda r, _: r.params.structured_outputs == StructuredOutputs(json_object=True),
        (5, "json", [], {"type": "xml"}, {"type": "json_schema"}),
    ),
    "structured_outputs": Field(
        {"regex": "a+"}, lambda r, _: r.params.structured_outputs == StructuredOutputs(regex="a+"),
        (5, "x", [], {"regex": 5}, {"regex": "a", "choice": ["b"]}, {"shape": 1}),
    ),
    "guided_json": Field(SCHEMA, lambda r, _: r.params.structured_outputs.kind == "json", (5, [])),
    "guided_regex": Field("a+", lambda r, _: r.params.structured_outputs.regex == "a+", (5, [])),
    "guided_choice": Field(["a"], lambda r, _: r.params.structured_outputs.choice == ("a",), (5, "x")),
    "guided_grammar": Field('root ::= "x"', lambda r, _: r.params.structured_outputs.kind == "grammar", (5, [])),
    "guided_json_object": Field(True, lambda r, _: r.params.structured_outputs.json_object, (5, "x")),
    "guided_whitespace_pattern": Field(
        " ?", lambda r, _: r.params.structured_outputs.whitespace_pattern == " ?", (5, []), {"guided_json": SCHEMA}
    ),
    "structural_tag": Field(None, None, (5, [])),
}  # fmt: skip
BOTH_LOGPROBS = {
    CHAT: Field(True, lambda _, b: choice(b)["logprobs"]["content"][0]["token"] == "H", FLAG, on=(CHAT,)),
    TEXT: Field(2, lambda _, b: len(choice(b)["logprobs"]["top_logprobs"][0]) == 2, (*INTEGER, -1, 21), on=(TEXT,)),
}


def table(path: str) -> dict[str, Field]:
    return {name: item for name, item in FIELDS.items() if path in item.on} | {"logprobs": BOTH_LOGPROBS[path]}


def body(path: str, **fields: Any) -> dict[str, Any]:
    start = {"messages": HI} if path == CHAT else {"prompt": "Hi"}
    if path == TEXT:
        fields.pop("messages", None)
        fields.pop("continue_final_message", None)
    elif "return_tokens_as_token_ids" in fields or "logprob_token_ids" in fields:
        fields["logprobs"] = True
    return {**start, **fields}


def last_of(text: str) -> Any:
    """The last event of a stream that has choices."""
    found = [json.loads(event[6:]) for event in text.split("\n\n") if event.startswith("data: {")]
    return [event for event in found if event.get("choices")][-1]


@pytest.mark.parametrize("path", PATHS)
def test_every_field_is_in_the_table(path):
    assert table(path).keys() == set(PATHS[path].model_fields)


@pytest.mark.parametrize("path", PATHS)
async def test_right_values_have_their_effect(harness, path):
    for name, item in table(path).items():
        client = harness.Client()
        async with harness.http(client, trust_request_chat_template=True) as http:
            sent = body(path, **{"max_tokens": 20, **item.also, name: item.good})
            response = await http.post(path, json=sent)
        assert response.status_code == 200, (name, response.text)
        reply = last_of(response.text) if sent.get("stream") else response.json()
        if item.effect is not None:
            assert item.effect(client.seen[0], reply), (name, client.seen[0], reply)


@pytest.mark.parametrize("path", PATHS)
async def test_wrong_values_are_a_400_that_names_the_field(harness, path):
    client = harness.Client()
    async with harness.http(client, trust_request_chat_template=True) as http:
        for name, item in table(path).items():
            for value in item.bad:
                sent = json.dumps(body(path, **{**item.also, name: value}))
                response = await http.post(path, content=sent)
                assert response.status_code == 400, (name, value, response.text)
                named = response.json()["error"]["param"] or ""
                ours = {name, "n"} if name in ("best_of", "beam_width") else {name}
                assert re.split(r"[.\[]", named)[0] in ours, (name, value, response.text)
        assert client.seen == []
        for name, (feature, neutral) in NOT_YET.items():
            response = await http.post(path, json=body(path, **{name: {"some": "thing"}}))
            assert (response.status_code, response.json()["error"]["param"]) == (400, name)
            assert feature in response.json()["error"]["message"]
            for value in neutral:
                assert (await http.post(path, json=body(path, **{name: value}))).status_code == 200, (name, value)
        assert (await http.post(path, json=body(path, **dict.fromkeys(WITHOUT_EFFECT, "x")))).status_code == 200


@pytest.mark.parametrize("path", PATHS)
async def test_null_means_not_given(harness, path):
    optional = [name for name in PATHS[path].model_fields if name not in ("messages", "prompt")]
    async with harness.http(harness.Client()) as http:
        response = await http.post(path, json=body(path, **dict.fromkeys(optional)))
    assert response.status_code == 200, response.text


async def test_a_stream_interval_makes_pieces_of_so_many_tokens(harness):
    async with harness.http(harness.Client(replies=("0123456789",))) as http:
        response = await http.post(TEXT, json={"prompt": "Hi", "stream": True, "stream_interval": 4, "max_tokens": 20})
    pieces = [json.loads(event)["choices"][0]["text"] for event in harness.events(response.text)[:-1]]
    assert pieces == ["0", "1234", "5678", "9"]


def test_the_docs_name_every_field():
    text = (Path(__file__).parents[3] / "docs" / "api.md").read_text()
    start = text.index("## Completions and chat completions")
    end = text.find("\n## ", start + 5)
    section = text[start : end if end > 0 else None]
    named = set(re.findall(r"`([a-z_0-9]+)`", section))
    known = {*ChatBody.model_fields, *CompletionBody.model_fields, *NOT_YET, *WITHOUT_EFFECT}
    assert known <= named, known - named
    refused = section[section.index("### Refused") : section.index("### Without effect")]
    assert set(re.findall(r"^\| `([a-z_0-9`, ]+)` \|", refused, re.M)) != set()
    assert set(NOT_YET) <= set(re.findall(r"`([a-z_0-9]+)`", refused))
    assert set(WITHOUT_EFFECT) <= set(re.findall(r"`([a-z_0-9]+)`", section[section.index("### Without effect") :]))

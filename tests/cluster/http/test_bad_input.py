"""Bad input: each row is a 4xx with OpenAI's error body, a sentence that names the field; the engine hears nothing."""

import json
import logging

import pytest

from octavo.cluster.observability.metrics import INGRESS

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "Hi"}]


def good(path):
    return {"messages": HI} if path == CHAT else {"prompt": "Hi"}


async def refused(http, path, data, status=400):
    response = await http.post(path, content=data, headers={"content-type": "application/json"})
    assert response.status_code == status, response.text
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].endswith(".")
    assert "Traceback" not in response.text
    return error


@pytest.mark.parametrize("path", [CHAT, TEXT, "/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"not json",
        b'"text"',
        b"[]",
        b"null",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800", "messages": "\\ud800", "tokens": "\\ud800"}',
        b'{"prompt": ' + b"[" * 10000 + b"}",
        b'{"a": ' + b"9" * 10000 + b"}",
        b"\x1f\x8b\x08",
    ],
    ids=range(11),
)
async def test_malformed_bodies(harness, path, data):
    client = harness.Client()
    async with harness.http(client) as http:
        await refused(http, path, data)
    assert client.seen == []


BOTH = [
    ({"max_tokens": "five"}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -3}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 0.5}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"n": 0}, "n"),
    ({"n": "2"}, "n"),
    ({"n": 10**6}, "n"),
    ({"n": 2, "temperature": 0}, "n"),
    ({"seed": 2**64}, "seed"),
    ({"seed": "x"}, "seed"),
    ({"stop": 5}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", 1]}, "stop[1]"),
    ({"stop_token_ids": [10**6]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"10000": 1}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"bad_words": [" "]}, "bad_words"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": 600}, "truncate_prompt_tokens"),
    ({"priority": 2**40}, "priority"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": "y"}}, "stream_options.include_usage"),
    ({"model": 5}, "model"),
    # what cannot be had must not be done silently wrong
    ({"kv_transfer_params": {"do_remote_prefill": True}}, "kv_transfer_params"),
]


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_wrong_fields(harness, path):
    client = harness.Client()
    async with harness.http(client) as http:
        for fields, param in BOTH:
            error = await refused(http, path, json.dumps({**good(path), **fields}))
            assert error["param"] == param, (fields, error)
            assert error["type"] == "invalid_request_error"
        assert (await http.post(path, json=good(path))).status_code == 200, "it must go on answering"
    assert len(client.seen) == 1


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": None}, "messages"),
        (CHAT, {"messages": "Hi"}, "messages"),
        (CHAT, {"messages": ["Hi"]}, "messages[0]"),
        (CHAT, {"messages": [{"content": "Hi"}]}, "messages[0].role"),
        (CHAT, {"messages": [*HI, {"role": "wizard", "content": "Hi"}]}, "messages[1].role"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "tool", "tool_call_id": "1"}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function"),
        (CHAT, {"tools": [{"type": "function"}]}, "tools[0].function"),
        (CHAT, {"tool_choice": "required"}, "tool_choice"),
        (CHAT, {"functions": [{}]}, "functions[0].name"),
        (CHAT, {"reasoning_effort": "huge"}, "reasoning_effort"),
        (CHAT, {"include_reasoning": "no"}, "include_reasoning"),
        (CHAT, {"modalities": ["text", "audio"]}, "modalities"),
        (CHAT, {"logprobs": 1}, "logprobs"),
        (CHAT, {"top_logprobs": 2}, "top_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens"),
        (CHAT, {"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        (CHAT, {"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
        (CHAT, {"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        (TEXT, {"prompt": None}, "prompt"),
        (TEXT, {"prompt": 5}, "prompt"),
        (TEXT, {"prompt": []}, "prompt"),
        (TEXT, {"prompt": [[]]}, "prompt"),
        (TEXT, {"prompt": ["a", 1]}, "prompt"),
        (TEXT, {"prompt": ["a", [1]]}, "prompt"),
        (TEXT, {"prompt": [1.5]}, "prompt"),
        (TEXT, {"prompt": [True]}, "prompt"),
        (TEXT, {"prompt": [-1]}, "prompt"),
        (TEXT, {"prompt": [261]}, "prompt"),
        (TEXT, {"prompt": "", "add_special_tokens": False}, "prompt"),
        (TEXT, {"logprobs": True}, "logprobs"),
        (TEXT, {"logprobs": 21}, "logprobs"),
        (TEXT, {"suffix": "end"}, "suffix"),
        (TEXT, {"best_of": 3}, "best_of"),
        (TEXT, {"prompt": ["a"] * 300, "n": 10}, "n"),
    ],
    ids=str,
)
async def test_wrong_fields_of_one_path(harness, path, fields, param):
    client = harness.Client()
    async with harness.http(client) as http:
        error = await refused(http, path, json.dumps({**good(path), **fields}))
    assert error["param"] == param, error
    assert client.seen == []


async def test_what_is_not_there(harness):
    async with harness.http(harness.Client()) as http:
        missing = await refused(http, TEXT, b"{}")
        error = await refused(http, CHAT, json.dumps({"model": "gpt-5", "messages": HI}), 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert "'gpt-5'" in error["message"]
        error = await refused(http, "/v1/nothing", b"{}", 404)
        get = await http.get(CHAT)
        model = await http.get("/v1/models/gpt-5")
    assert missing["message"] == "prompt is required."
    assert (get.status_code, get.headers["allow"]) == (405, "POST")
    assert set(get.json()["error"]) == {"message", "type", "param", "code"}
    assert (model.status_code, model.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_too_long_for_the_context_says_both_lengths(harness, path):
    long = {"messages": [{"role": "user", "content": "x" * 600}]} if path == CHAT else {"prompt": "x" * 600}
    async with harness.http(harness.Client()) as http:
        prompt = await refused(http, path, json.dumps(long))
        answer = await refused(http, path, json.dumps({**good(path), "max_tokens": 510}))
    tokens = 600 + (len("<|start|>user\n<|end|>\n<|start|>assistant\n") - 22 if path == CHAT else 0) + 1
    assert prompt["param"] == ("messages" if path == CHAT else "prompt")
    assert "512" in prompt["message"]
    assert str(tokens) in prompt["message"] or path == CHAT
    assert answer["param"] == "max_tokens"
    assert "512" in answer["message"]
    assert "510" in answer["message"]


async def test_too_long_for_this_server(harness):
    async with harness.http(harness.Client(), max_prompt_tokens=10) as http:
        error = await refused(http, TEXT, json.dumps({"prompt": "x" * 11}))
    assert error["message"] == "The prompt is 12 tokens long, but this server takes prompts of at most 10 tokens."


async def test_neutral_values_of_later_features_are_fine(harness):
    body = {
        "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "parallel_tool_calls": True,
        "guided_json": None, "include_reasoning": True,
        "modalities": ["text"], "user": "ann", "store": False, "metadata": {"a": "b"}, "n": None, "stop": None,
        "temperature": None, "max_tokens": None, "stream": None, "logit_bias": None,
    }  # fmt: skip
    async with harness.http(harness.Client()) as http:
        response = await http.post(CHAT, json={"messages": HI, **body})
    assert response.status_code == 200, response.text


async def test_unknown_fields_are_accepted_with_one_warning(harness, caplog):
    async with harness.http(harness.Client()) as http:
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                response = await http.post(CHAT, json={"messages": HI, "frobnicate": 1})
                assert response.status_code == 200
        metrics = (await http.get("/metrics")).text
    assert [r.message for r in caplog.records if "frobnicate" in r.message] == [
        "requests have an unknown field 'frobnicate': it has no effect"
    ]
    assert f'octavo:ignored_request_fields_total{{ingress="{INGRESS}",model_name="scripted"}} 3.0' in metrics

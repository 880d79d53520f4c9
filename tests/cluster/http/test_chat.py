"""/v1/chat/completions, /tokenize and /detokenize: templates, shapes, and what messages may hold."""

import json

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from octavo.cluster.ingress.replies import event as to_event

HI = [{"role": "user", "content": "Hi"}]
HI_TEXT = "<|bos|><|start|>user\nHi<|end|>\n<|start|>assistant\n"


async def chat(http, **body):
    response = await http.post("/v1/chat/completions", json={"messages": HI, **body})
    assert response.status_code == 200, response.text
    return ChatCompletion.model_validate(response.json(), strict=True)


async def stream(http, harness, **body):
    response = await http.post("/v1/chat/completions", json={"messages": HI, "stream": True, **body})
    assert response.status_code == 200, response.text
    *chunks, done = harness.events(response.text)
    assert done == "[DONE]"
    return [ChatCompletionChunk.model_validate(json.loads(chunk), strict=True) for chunk in chunks]


def prompt_text(harness, request):
    from octavo.engine.text.byte_tokenizer import ByteTokenizer

    return ByteTokenizer().decode(request.prompt_token_ids, skip_special_tokens=False)


async def test_a_whole_answer(harness):
    client = harness.Client()
    async with harness.http(client) as http:
        answer = await chat(http)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "Hello, world", "stop")
    assert choice.logprobs is None
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.usage.completion_tokens == 13
    (request,) = client.seen
    assert prompt_text(harness, request) == HI_TEXT
    assert request.params.max_tokens == harness.info.max_model_len - len(request.prompt_token_ids)


async def test_a_stream_is_role_text_reason_usage(harness):
    async with harness.http(harness.Client(replies=("abc",))) as http:
        chunks = await stream(http, harness, stream_options={"include_usage": True})
    first, *middle, end, usage = chunks
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert [chunk.choices[0].delta.content for chunk in middle] == ["a", "b", "c"]
    assert all(chunk.choices[0].delta.role is None and chunk.choices[0].finish_reason is None for chunk in middle)
    assert (end.choices[0].delta.content, end.choices[0].finish_reason) == (None, "stop")
    assert usage.choices == []
    assert usage.usage.total_tokens == usage.usage.prompt_tokens + 4
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


@pytest.mark.parametrize("step", [1, 4, 100])
@pytest.mark.parametrize(
    "body",
    [{}, {"n": 3}, {"stop": ["wor"]}, {"logprobs": True, "top_logprobs": 2}, {"max_completion_tokens": 2, "n": 2}],
    ids=str,
)
async def test_streamed_equals_whole(harness, body, step):
    client = harness.Client(replies=("Hello, world", "Köln 🎉 wor", "lo"), step=step)
    async with harness.http(client) as http:
        whole = await chat(http, **body)
        chunks = await stream(http, harness, **body)
    for choice in whole.choices:
        parts = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(part.delta.content or "" for part in parts) == choice.message.content
        assert [part.finish_reason for part in parts if part.finish_reason] == [choice.finish_reason]
        if body.get("logprobs"):
            joined = [entry for part in parts if part.logprobs for entry in part.logprobs.content]
            assert joined == choice.logprobs.content


async def test_logprobs_in_openais_form(harness):
    async with harness.http(harness.Client(replies=("é",))) as http:
        answer = await chat(http, logprobs=True, top_logprobs=1, max_tokens=2)
        plain = await chat(http, logprobs=True, max_tokens=2)
    first, second = answer.choices[0].logprobs.content
    assert (first.logprob, first.bytes, second.bytes) == (-1.0, [0xC3], [0xA9])
    assert [(top.logprob, top.bytes) for top in first.top_logprobs] == [(-0.5, [0xC4])]
    assert [entry.top_logprobs for entry in plain.choices[0].logprobs.content] == [[], []]


async def test_token_ids_and_prompt_logprobs(harness):
    client = harness.Client(replies=("hi",))
    async with harness.http(client) as http:
        answer = await chat(http, return_token_ids=True, prompt_logprobs=0)
    assert answer.choices[0].token_ids == [104, 105, 257]
    assert answer.prompt_token_ids == list(client.seen[0].prompt_token_ids)
    assert answer.prompt_logprobs[0] is None
    assert answer.prompt_logprobs[1] == {"258": {"logprob": -1.0, "rank": 2, "decoded_token": "<|start|>"}}


async def test_what_messages_may_hold(harness):
    client = harness.Client()
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}], "name": "Ann"},
        {"role": "assistant", "content": "three", "refusal": None, "tool_calls": None},
    ]
    async with harness.http(client) as http:
        await chat(http, messages=messages)
    assert prompt_text(harness, client.seen[0]) == (
        "<|bos|><|start|>system\nBe brief.<|end|>\n<|start|>user\none\ntwo<|end|>\n"
        "<|start|>assistant\nthree<|end|>\n<|start|>assistant\n"
    )


async def test_continuing_the_final_message(harness):
    client = harness.Client(replies=(" a time",))
    messages = [*HI, {"role": "assistant", "content": "Once upon"}]
    async with harness.http(client) as http:
        plain = await chat(http, messages=messages, continue_final_message=True, add_generation_prompt=False)
        echoed = await chat(http, messages=messages, continue_final_message=True, echo=True)
    assert prompt_text(harness, client.seen[0]).endswith("<|start|>assistant\nOnce upon")
    assert client.seen[0].prompt_token_ids == client.seen[1].prompt_token_ids
    assert plain.choices[0].message.content == " a time"
    assert echoed.choices[0].message.content == "Once upon a time"


async def test_chat_templates_from_requests_only_where_trusted(harness):
    client = harness.Client()
    template = "{{ messages[0].content }}{{ mood }}"
    body = {"messages": HI, "chat_template": template, "chat_template_kwargs": {"mood": "!"}}
    async with harness.http(client) as http:
        refused = await http.post("/v1/chat/completions", json=body)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "chat_template"
    async with harness.http(client, trust_request_chat_template=True) as http:
        await chat(http, **body)
    async with harness.http(client, chat_template="[{{ messages[0].content }}]") as http:
        await chat(http)
    assert [prompt_text(harness, request) for request in client.seen] == ["Hi!", "[Hi]"]


async def test_tokenize_and_back(harness):
    async with harness.http(harness.Client()) as http:
        text = (await http.post("/tokenize", json={"prompt": "hé", "return_token_strs": True})).json()
        plain = (await http.post("/tokenize", json={"prompt": "hé", "add_special_tokens": False})).json()
        talk = (await http.post("/tokenize", json={"messages": HI, "model": "scripted"})).json()
        back = (await http.post("/detokenize", json={"tokens": talk["tokens"]})).json()
        neither = await http.post("/tokenize", json={})
    assert text == {
        "count": 4,
        "max_model_len": 512,
        "tokens": [256, 104, 0xC3, 0xA9],
        "token_strs": ["<|bos|>", "h", "\ufffd", "\ufffd"],
    }
    assert plain["tokens"] == [104, 0xC3, 0xA9]
    assert back == {"prompt": HI_TEXT}
    assert neither.status_code == 400


def test_an_event_is_one_line_to_every_client():
    text = "a\u0085b\u2028c\u2029d\x1ce\nf é"
    event = to_event({"text": text}).decode()
    (line,) = event.removesuffix("\n\n").splitlines()
    assert json.loads(line.removeprefix("data: ")) == {"text": text}

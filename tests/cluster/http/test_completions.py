"""/v1/completions: every form of prompt, whole and streamed, in the shapes of OpenAI's own types."""

import copy
import dataclasses
import json

import pytest
from openai.types import Completion

from octavo.engine.types import GenerationDefaults


async def complete(http, **body):
    response = await http.post("/v1/completions", json={"prompt": "Say", "max_tokens": 50, **body})
    assert response.status_code == 200, response.text
    return checked(response.json())


async def stream(http, harness, **body):
    response = await http.post("/v1/completions", json={"prompt": "Say", "max_tokens": 50, "stream": True, **body})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done = harness.events(response.text)
    assert done == "[DONE]"
    return [checked(json.loads(chunk)) for chunk in chunks]


def checked(body):
    """`body` as the client sees it. OpenAI's type is kept strictly, but for the nulls that it does not know and OpenAI
    sends: a chunk's finish reason before the end, and the logprob of an echoed prompt's first token."""
    strict = copy.deepcopy(body)
    for choice in strict["choices"]:
        choice["finish_reason"] = choice["finish_reason"] or "stop"
        logprobs = choice["logprobs"] or {}
        for name, nothing in (("token_logprobs", 0.0), ("top_logprobs", {})):
            if logprobs.get(name) and logprobs[name][0] is None:
                logprobs[name][0] = nothing
    Completion.model_validate(strict, strict=True)
    return Completion.construct(**body)


def collected(chunks):
    """choice → (text, finish reason), from a stream."""
    texts, reasons = {}, {}
    for chunk in chunks:
        for choice in chunk.choices:
            assert choice.index not in reasons, "a chunk after the end"
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    return {index: (texts[index], reasons[index]) for index in sorted(texts)}


async def test_a_whole_answer(harness):
    client = harness.Client()
    async with harness.http(client) as http:
        answer = await complete(http)
    assert answer.object == "text_completion"
    assert answer.model == "scripted"
    assert answer.id.startswith("cmpl-")
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == ("Hello, world", "stop", None)
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (4, 13, 17)
    assert usage.prompt_tokens_details.cached_tokens == 3
    assert client.aborted == []


async def test_defaults_are_openais(harness):
    client = harness.Client(replies=("x" * 100,))
    async with harness.http(client) as http:
        response = await http.post("/v1/completions", json={"prompt": "Say"})
    choice = Completion.model_validate(response.json()).choices[0]
    assert (choice.text, choice.finish_reason) == ("x" * 16, "length")
    params = client.seen[0].params
    assert (params.temperature, params.top_p, params.top_k, params.n) == (1.0, 1.0, 0, 1)
    assert params.seed is not None, "a resubmission must draw the same tokens"


async def test_model_defaults_apply_to_what_is_not_given(harness):
    model = GenerationDefaults(temperature=0.3, top_k=7, repetition_penalty=1.1, max_tokens=9)
    client = harness.Client(info_value=dataclasses.replace(harness.info, generation_defaults=model))
    async with harness.http(client) as http:
        await complete(http, top_k=3)
        await http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}]})
    async with harness.http(client, defaults=GenerationDefaults(temperature=0.7)) as http:
        await complete(http)
    got = [(request.params.temperature, request.params.top_k, request.params.max_tokens) for request in client.seen]
    assert got == [(0.3, 3, 50), (0.3, 7, 9), (0.7, 0, 50)]
    assert client.seen[0].params.repetition_penalty == 1.1


@pytest.mark.parametrize(
    ("prompt", "token_ids"),
    [
        ("ab", [(256, 97, 98)]),
        (["ab", "c"], [(256, 97, 98), (256, 99)]),
        ([97, 98], [(97, 98)]),
        ([[97], [98, 99]], [(97,), (98, 99)]),
    ],
)
async def test_forms_of_prompt(harness, prompt, token_ids):
    client = harness.Client(
        reply_of=lambda request: f"<{bytes(t for t in request.prompt_token_ids if t < 256).decode()}>"
    )
    async with harness.http(client) as http:
        answer = await complete(http, prompt=prompt, n=2)
        chunks = await stream(http, harness, prompt=prompt, n=2)
    assert sorted(r.prompt_token_ids for r in client.seen[: len(token_ids)]) == sorted(token_ids)
    expected = [f"<{bytes(t for t in ids if t < 256).decode()}>" for ids in token_ids for _ in range(2)]
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == list(range(len(expected)))
    assert collected(chunks) == {index: (text, "stop") for index, text in enumerate(expected)}


async def test_engine_ids_are_unique_even_if_clients_repeat_theirs(harness):
    client = harness.Client()
    async with harness.http(client) as http:
        first = await complete(http, prompt=["a", "b"], request_id="mine")
        await complete(http, request_id="mine")
    assert first.id == "cmpl-mine"
    assert len({request.request_id for request in client.seen}) == 3


@pytest.mark.parametrize("step", [1, 2, 5, 100])
@pytest.mark.parametrize(
    "body",
    [
        {},
        {"n": 3},
        {"max_tokens": 3},
        {"stop": "wor"},
        {"stop": ["zzz", "o, w", "Hello, world!"]},
        {"stop": "lo", "include_stop_str_in_output": True},
        {"echo": True},
        {"echo": True, "logprobs": 2},
        {"logprobs": 0},
        {"logprobs": 3, "stop": "wor"},
        {"return_token_ids": True, "echo": True, "prompt": [72, 73]},
    ],
    ids=str,
)
async def test_streamed_equals_whole(harness, body, step):
    client = harness.Client(replies=("Hello, world", "Grüße aus Köln 🎉 wor", "lo"), step=step)
    async with harness.http(client) as http:
        whole = await complete(http, **body)
        chunks = await stream(http, harness, **body)
    assert collected(chunks) == {c.index: (c.text, c.finish_reason) for c in whole.choices}
    for choice in whole.choices:
        parts = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        if choice.logprobs is None:
            assert all(part.logprobs is None for part in parts)
        else:
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                joined = [entry for part in parts for entry in getattr(part.logprobs, name)]
                assert joined == getattr(choice.logprobs, name), name
        if body.get("return_token_ids"):
            assert [t for part in parts for t in part.token_ids] == choice.token_ids
            assert parts[0].prompt_token_ids == choice.prompt_token_ids == [72, 73]


async def test_one_event_per_delta(harness):
    async with harness.http(harness.Client(replies=("abc",))) as http:
        chunks = await stream(http, harness)
    assert [chunk.choices[0].text for chunk in chunks] == ["a", "b", "c", ""]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, None, "stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


async def test_half_a_character_is_never_sent(harness):
    async with harness.http(harness.Client(replies=("é🎉",))) as http:
        chunks = await stream(http, harness)
    assert [chunk.choices[0].text for chunk in chunks] == ["é", "🎉", ""]


async def test_a_stop_string_never_leaks(harness):
    client = harness.Client(replies=("one END two", "EN one ENDE"))
    async with harness.http(client) as http:
        chunks = await stream(http, harness, stop="END", n=2)
    assert collected(chunks) == {0: ("one ", "stop"), 1: ("EN one ", "stop")}
    assert all("END" not in chunk.choices[0].text for chunk in chunks)
    assert [c.stop_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["END", "END"]
    assert client.aborted == [client.seen[0].request_id], "what a stop string ended must not run on"


async def test_a_choice_ended_by_a_stop_string_ignores_what_follows(harness):
    client = harness.Client(replies=("a.bcdefgh", "no end in sight"))
    async with harness.http(client) as http:
        answer = await complete(http, stop=".", n=2)
    assert [(c.text, c.finish_reason) for c in answer.choices] == [("a", "stop"), ("no end in sight", "stop")]
    assert answer.usage.completion_tokens == 2 + 16
    assert client.aborted == []


async def test_usage_in_the_stream(harness):
    async with harness.http(harness.Client(replies=("abc",))) as http:
        *chunks, last = await stream(http, harness, stream_options={"include_usage": True})
        running = await stream(http, harness, stream_options={"include_usage": True, "continuous_usage_stats": True})
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (4, 4)
    assert [chunk.usage.completion_tokens for chunk in running] == [1, 2, 3, 4, 4]


async def test_logprobs_in_openais_form(harness):
    async with harness.http(harness.Client(replies=("hi",))) as http:
        answer = await complete(http, logprobs=2, max_tokens=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs.tokens == ["h", "i"]
    assert logprobs.token_logprobs == [-1.0, -1.0]
    assert logprobs.top_logprobs == [{"h": -1.0, "i": -0.5}, {"i": -1.0, "j": -0.5}]
    assert logprobs.text_offset == [0, 1]


async def test_tokens_as_ids(harness):
    async with harness.http(harness.Client(replies=("hi",))) as http:
        answer = await complete(http, logprobs=1, max_tokens=1, return_tokens_as_token_ids=True)
    assert answer.choices[0].logprobs.tokens == ["token_id:104"]
    assert answer.choices[0].logprobs.top_logprobs == [{"token_id:104": -1.0, "token_id:105": -0.5}]


async def test_echo_with_logprobs_scores_the_prompt(harness):
    client = harness.Client()
    async with harness.http(client) as http:
        answer = await complete(http, prompt=[65, 66, 67], echo=True, logprobs=1, max_tokens=0)
    (choice,) = answer.choices
    assert choice.text == "ABC"
    assert choice.finish_reason == "length"
    assert choice.logprobs.tokens == ["A", "B", "C"]
    assert choice.logprobs.token_logprobs == [None, -1.0, -1.0]
    assert choice.logprobs.top_logprobs == [None, {"B": -1.0, "C": -0.5}, {"C": -1.0, "D": -0.5}]
    assert answer.usage.completion_tokens == 0


async def test_prompt_logprobs_in_vllms_form(harness):
    async with harness.http(harness.Client()) as http:
        answer = await complete(http, prompt=[65, 66], prompt_logprobs=1, max_tokens=1)
    first, second = answer.choices[0].prompt_logprobs
    assert first is None
    assert second == {
        "66": {"logprob": -1.0, "rank": 2, "decoded_token": "B"},
        "67": {"logprob": -0.5, "rank": 1, "decoded_token": "C"},
    }


async def test_infinite_logprobs_stay_json(harness):
    from octavo.cluster.ingress.replies import finite

    assert [finite(x) for x in (float("-inf"), float("nan"), -20000.0, -1.0)] == [-9999.0, -9999.0, -9999.0, -1.0]


async def test_sampling_fields_reach_the_engine(harness):
    client = harness.Client()
    body = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "presence_penalty": 0.1, "frequency_penalty": 0.2,
        "repetition_penalty": 1.2, "seed": 7, "stop_token_ids": [3], "ignore_eos": True, "min_tokens": 2,
        "skip_special_tokens": False, "spaces_between_special_tokens": False, "logit_bias": {"5": 200},
        "allowed_token_ids": [1, 2, 5],
    }  # fmt: skip
    async with harness.http(client) as http:
        await complete(http, **body, bad_words=["no"], priority=3, cache_salt="tenant")
    (request,) = client.seen
    for name, value in body.items():
        got = getattr(request.params, name)
        expected = {5: 100.0} if name == "logit_bias" else tuple(value) if isinstance(value, list) else value
        assert got == expected, name
    assert request.bad_words_token_ids == ((110, 111),)
    assert (request.priority, request.cache_salt) == (3, "tenant")


async def test_truncation(harness):
    client = harness.Client()
    async with harness.http(client) as http:
        await complete(http, prompt=[1, 2, 3, 4], truncate_prompt_tokens=2)
        await complete(http, prompt=[1, 2, 3, 4], truncate_prompt_tokens=2, truncation_side="right")
        await complete(http, prompt=[5] * 600, truncate_prompt_tokens=-1, max_tokens=1)
    assert [request.prompt_token_ids for request in client.seen[:2]] == [(3, 4), (1, 2)]
    assert len(client.seen[2].prompt_token_ids) == 511


async def test_special_tokens_are_the_clients_choice(harness):
    client = harness.Client()
    async with harness.http(client) as http:
        await complete(http, prompt="a", add_special_tokens=False)
    assert client.seen[0].prompt_token_ids == (97,)

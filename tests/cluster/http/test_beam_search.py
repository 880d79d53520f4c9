"""Beam search over HTTP, with the fake engine behind it."""

import asyncio
import contextlib

import httpx
import pytest

from octavo.cluster.ingress.client import LocalEngineClient
from octavo.engine.build import build_engine
from octavo.engine.config import EngineConfig
from octavo.engine.loop import EngineLoop

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = {"messages": [{"role": "user", "content": "Hi"}]}


@contextlib.contextmanager
def fake_engine(model="fake:step_ms=0.1", **config):
    engine = build_engine(EngineConfig(model=model, **config))
    loops = []

    def start(on_deltas):
        loops.append(EngineLoop(engine.core, on_deltas))
        loops[0].start()
        return loops[0]

    try:
        yield LocalEngineClient(engine.info, start), engine.core
    finally:
        loops[0].stop()


def score(choice, penalty=1.0):
    values = choice["logprobs"]["token_logprobs"]
    return sum(values) / len(values) ** penalty


async def test_the_best_beams_come_best_first(harness):
    asked = {"prompt": "Once", "use_beam_search": True, "max_tokens": 12, "logprobs": 2, "temperature": 0.7}
    with fake_engine() as (client, core):
        async with harness.http(client) as http:
            four = (await http.post(TEXT, json={**asked, "n": 4, "return_token_ids": True})).json()
            two = (await http.post(TEXT, json={**asked, "n": 2, "beam_width": 4})).json()
            best = (await http.post(TEXT, json={**asked, "n": 1, "best_of": 4})).json()
            long = (
                await http.post(TEXT, json={**asked, "n": 4, "length_penalty": 0.0, "early_stopping": "never"})
            ).json()
            chat = (await http.post(CHAT, json={**HI, "use_beam_search": True, "n": 3, "max_tokens": 9})).json()
        assert core.stats().kv_blocks_held == 0
    choices = four["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert len({tuple(choice["token_ids"]) for choice in choices}) == 4
    assert sorted(map(score, choices), reverse=True) == list(map(score, choices))
    assert all(len(choice["logprobs"]["top_logprobs"][0]) in (2, 3) for choice in choices)
    assert four["usage"]["completion_tokens"] == sum(len(choice["token_ids"]) for choice in choices)
    assert [choice["text"] for choice in two["choices"]] == [choice["text"] for choice in choices[:2]]
    assert [choice["text"] for choice in best["choices"]] == [choices[0]["text"]]
    assert len(long["choices"]) == 4
    assert [choice["finish_reason"] for choice in chat["choices"]] == ["length"] * 3
    assert all(len(choice["message"]["content"]) > 0 for choice in chat["choices"])


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream": True}, "stream"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 3, "beam_width": 2}, "n"),
        ({"beam_width": 0}, "n"),
        ({"stop": "x"}, "stop"),
        ({"presence_penalty": 1.0}, "presence_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"response_format": {"type": "json_object"}}, "structured_outputs"),
        ({"length_penalty": 1e300}, "length_penalty"),
        ({"length_penalty": "1"}, "length_penalty"),
        ({"early_stopping": "often"}, "early_stopping"),
        ({"use_beam_search": "yes"}, "use_beam_search"),
    ],
    ids=str,
)
async def test_what_cannot_be_searched_is_a_400(harness, path, fields, param):
    client = harness.Client()
    start = HI if path == CHAT else {"prompt": "Hi"}
    async with harness.http(client) as http:
        response = await http.post(path, json={**start, "use_beam_search": True, "max_tokens": 5, **fields})
    assert (response.status_code, response.json()["error"]["param"].split(".")[0]) == (400, param), response.text
    assert client.seen == []


async def test_a_client_that_leaves_ends_the_search(harness):
    asked = {**HI, "use_beam_search": True, "n": 4, "max_tokens": 400, "ignore_eos": True}
    with fake_engine("fake:step_ms=5") as (client, core):
        with harness.server(client) as url:
            async with httpx.AsyncClient() as http:
                with pytest.raises(httpx.ReadTimeout):
                    await http.post(f"{url}{CHAT}", json=asked, timeout=0.3)
            for _ in range(200):
                if not core.has_work:
                    break
                await asyncio.sleep(0.01)
        assert not core.has_work
        assert core.stats().kv_blocks_held == 0

"""What holds for every path: keys, body size, request ids, capacity, failures, and the access log."""

import asyncio
import json
import logging
import subprocess
import sys

import httpx
import pytest

from octavo.cluster.ingress.client import ReplicaLost
from octavo.cluster.observability.metrics import INGRESS
from octavo.engine.errors import CapacityError, ConfigError, RankLost, RequestError, StepError
from octavo.engine.types import EngineStats, TokenDelta

HI = {"messages": [{"role": "user", "content": "Hi"}]}
PATH = "/v1/chat/completions"
KEYS = {"api_keys": ("secret-1", "sécret-2")}


def bearer(key):
    return {"authorization": f"Bearer {key}".encode()}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        (bearer("wrong"), 401),
        (bearer(""), 401),
        (bearer("secret-1x"), 401),
        ({"authorization": "secret-1"}, 401),
        ({"authorization": "Basic secret-1"}, 401),
        ({"authorization": b"Bearer \xff\xfe"}, 401),
        (bearer("secret-1"), 200),
        ({"authorization": "bearer  secret-1 "}, 200),
    ],
)
async def test_keys(harness, headers, status):
    client = harness.Client()
    async with harness.http(client, **KEYS) as http:
        response = await http.post(PATH, json=HI, headers=headers)
    assert response.status_code == status
    if status == 401:
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
        assert client.seen == []


async def test_what_is_open_without_a_key(harness):
    async with harness.http(harness.Client(), **KEYS) as http:
        for path in ("/health", "/ready", "/ping", "/version", "/metrics"):
            assert (await http.get(path)).status_code == 200, path
        assert (await http.post("/ping")).status_code == 200
        for path in ("/v1/models", "/nothing", "/openapi.json", "//health", "/health/"):
            assert (await http.get(path)).status_code == 401, path
        assert (await http.post("/tokenize", json={"prompt": "a"})).status_code == 401


async def test_browsers_may_ask_first(harness):
    async with harness.http(harness.Client(), **KEYS) as http:
        asked = await http.options(
            PATH,
            headers={
                "origin": "https://a.example",
                "access-control-request-method": "POST",
                "access-control-request-headers": "authorization",
            },
        )
        refused = await http.post(PATH, json=HI, headers={"origin": "https://a.example"})
    assert asked.status_code == 200
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "*", "a page must be able to read why"


async def test_body_size(harness):
    async def endless():
        for _ in range(100):
            yield b"x" * 1000

    client = harness.Client()
    async with harness.http(client, max_body_bytes=2000) as http:
        announced = await http.post(PATH, content=b"x" * 2001)
        chunked = await http.post(PATH, content=endless())
        fits = await http.post(PATH, json=HI)
    for response in (announced, chunked):
        assert response.status_code == 413
        assert "2000 bytes" in response.json()["error"]["message"]
    assert fits.status_code == 200


@pytest.mark.parametrize("given", ["abc-123", None, "has space", "x" * 200])
async def test_request_ids(harness, given):
    async with harness.http(harness.Client()) as http:
        headers = {} if given is None else {"x-request-id": given}
        good = await http.post(PATH, json=HI, headers=headers)
        bad = await http.post(PATH, json={}, headers=headers)
    for response in (good, bad):
        echoed = response.headers["x-request-id"]
        assert (echoed == given) == (given == "abc-123")
        assert len(echoed) >= 7
    assert good.json()["id"] == f"chatcmpl-{good.headers['x-request-id']}"


CAUSES = [
    (RequestError("No.", "prompt"), 400, None),
    (CapacityError("Full.", 7), 429, "7"),
    (ReplicaLost("Gone."), 503, "1"),
    (RankLost("Gone."), 503, "1"),
    (StepError("secret detail"), 500, None),
    (ZeroDivisionError("secret detail"), 500, None),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("cause", "status", "retry_after"), CAUSES, ids=lambda x: type(x).__name__)
async def test_engine_refusals_are_statuses_even_for_streams(harness, cause, status, retry_after, stream, caplog):
    client = harness.Client(fail=cause)
    async with harness.http(client) as http:
        response = await http.post(PATH, json={**HI, "stream": stream}, headers={"x-request-id": "the-id"})
        again = (client.__dict__.update(fail=None), await http.post(PATH, json=HI))[1]
    assert response.status_code == status
    assert response.headers.get("retry-after") == retry_after
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert "secret" not in response.text
    logged = [r for r in caplog.records if r.levelno >= logging.ERROR and "the-id" in r.getMessage()]
    assert len(logged) == (status >= 500)
    assert again.status_code == 200


@pytest.mark.parametrize(
    ("cause", "status"),
    [
        (ReplicaLost("Gone."), 503),
        (ZeroDivisionError("secret detail"), 500),
        (TokenDelta("x", 0, (), finish_reason="error", error="secret detail"), 500),
        (TokenDelta("x", 0, (), finish_reason="abort"), 503),
    ],
    ids=str,
)
async def test_a_failure_half_way(harness, cause, status):
    client = harness.Client(fail_after=(3, cause))
    async with harness.http(client) as http:
        whole = await http.post(PATH, json=HI)
        stream = await http.post(PATH, json={**HI, "stream": True})
        metrics = (await http.get("/metrics")).text
    assert whole.status_code == status
    assert stream.status_code == 200
    *_, text, error, done = harness.events(stream.text)
    assert json.loads(text)["choices"][0]["delta"]["content"] == "l"
    assert json.loads(error) == whole.json()
    assert done == "[DONE]"
    assert "secret" not in whole.text + stream.text
    assert client.live == 0
    assert (
        f'octavo:request_success_total{{finished_reason="error",ingress="{INGRESS}",model_name="scripted"}} 2.0'
        in metrics
    )


@pytest.mark.parametrize("hang_after", [0, 3])
@pytest.mark.parametrize("stream", [False, True])
async def test_requests_that_take_too_long(harness, stream, hang_after):
    client = harness.Client(hang_after=hang_after)
    async with harness.http(client, request_timeout_s=0.1, early_errors_s=10.0) as http:
        response = await http.post(PATH, json={**HI, "stream": stream})
    if stream and hang_after:
        *_, error, done = harness.events(response.text)
        assert (json.loads(error)["error"]["code"], done) == ("request_timeout", "[DONE]")
    else:
        assert response.status_code == 408
        assert "0.1 s" in response.json()["error"]["message"]
    assert client.aborted == [client.seen[0].request_id]


async def test_a_slow_first_token_does_not_hold_back_the_status_line(harness):
    client = harness.Client(delay_s=0.2, replies=("a",))
    with harness.server(client, early_errors_s=0.02) as url:
        async with (
            httpx.AsyncClient(base_url=url) as http,
            asyncio.timeout(5),
            http.stream("POST", PATH, json={**HI, "stream": True}) as response,
        ):
            assert client.seen
            lines = response.aiter_lines()
            first = json.loads((await anext(lines)).removeprefix("data: "))
            assert first["choices"][0]["delta"]["role"] == "assistant"
            rest = [line async for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert sum('"role"' in line for line in rest) == 0


async def test_more_requests_than_places(harness):
    client = harness.Client(hang_after=0)
    with harness.server(client, max_ongoing_requests=2) as url:
        async with httpx.AsyncClient(base_url=url) as http:
            waiting = [asyncio.create_task(http.post(PATH, json={**HI, "stream": i == 1})) for i in range(2)]
            await harness.eventually(lambda: client.live == 2)
            refused = await http.post(PATH, json=HI)
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert (await http.get("/health")).status_code == 200
            assert 'reason="max_ongoing_requests"} 1.0' in (await http.get("/metrics")).text
            for task in waiting:
                task.cancel()
            await harness.eventually(lambda: client.live == 0)
            client.hang_after = None
            assert (await http.post(PATH, json=HI)).status_code == 200, "places must be free again"


async def test_health_says_when_no_engine_is_there(harness):
    async with harness.http(harness.Client(stats_value=[])) as http:
        health = await http.get("/health")
        assert (health.status_code, health.json()["error"]["message"]) == (503, "No engine is running.")
        assert (await http.get("/ping")).status_code == 503
        assert (await http.get("/metrics")).status_code == 200


async def test_ready_means_a_token_was_generated(harness):
    for engines, status in (
        ([], 503),
        ([EngineStats(num_running=1)], 503),
        ([EngineStats(), EngineStats(generation_tokens=1)], 200),
    ):
        async with harness.http(harness.Client(stats_value=engines)) as http:
            ready = await http.get("/ready")
            assert ready.status_code == status
            assert status == 200 or ready.json()["error"]["code"] == "unavailable"
            if engines:
                assert (await http.get("/health")).status_code == 200


async def test_models_and_version(harness):
    async with harness.http(harness.Client(), model_source="org/repo") as http:
        models = (await http.get("/v1/models")).json()
        other = (await http.get("/v1/models/other-name")).json()
        version = (await http.get("/version")).json()
        served = await http.post(PATH, json={**HI, "model": "other-name"})
    assert [model["id"] for model in models["data"]] == ["scripted", "other-name"]
    assert other == {
        "id": "other-name", "object": "model", "created": 1234, "owned_by": "octavo", "root": "org/repo",
        "parent": None, "max_model_len": 512,
    }  # fmt: skip
    assert list(version) == ["version"]
    assert served.json()["model"] == "scripted"


async def test_the_openapi_document_has_the_bodies(harness):
    async with harness.http(harness.Client()) as http:
        document = (await http.get("/openapi.json")).json()
    body = document["paths"][PATH]["post"]["requestBody"]["content"]["application/json"]["schema"]
    schema = document["components"]["schemas"][body["$ref"].rsplit("/", 1)[1]]
    assert {"messages", "temperature", "max_completion_tokens"} <= schema["properties"].keys()
    assert "Message" in document["components"]["schemas"]


async def test_one_access_log_line_per_request(harness, caplog):
    with caplog.at_level(logging.INFO, "octavo.access"):
        async with harness.http(harness.Client()) as http:
            await http.post(PATH, json=HI, headers={"x-request-id": "one"})
            await http.post(PATH, json={}, headers={"x-request-id": "two"})
            await http.get("/health")
            await http.get("/line%0Abreak")
    lines = [r.getMessage() for r in caplog.records if r.name == "octavo.access"]
    assert len(lines) == 3
    assert lines[0].startswith("POST '/v1/chat/completions' id=one ")
    for part in ("status=200", "prompt_tokens=22", "completion_tokens=13", "ttft_ms=", "total_ms=", "outcome=stop"):
        assert part in lines[0]
    assert "id=two" in lines[1]
    assert "status=400" in lines[1]
    assert "\n" not in lines[2]


def test_impossible_settings():
    from octavo.cluster.ingress.settings import IngressSettings

    for bad in ({"served_model_names": ()}, {"api_keys": ("",)}, {"max_body_bytes": 0}, {"request_timeout_s": -1}):
        with pytest.raises(ConfigError):
            IngressSettings(**{"served_model_names": ("a",), **bad})


def test_the_ingress_starts_without_what_is_slow_to_import():
    code = (
        "import sys, octavo.cluster.ingress.app, octavo.cluster.chat, octavo.cluster.offline\n"
        "print([name for name in ('torch', 'ray', 'transformers', 'openai') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"

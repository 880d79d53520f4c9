"""The official client against a listening server: what applications will do, and many at once."""

import asyncio
import contextlib
import re

import openai
import pytest

from octavo.cluster.ingress.client import LocalEngineClient
from octavo.engine.build import build_engine
from octavo.engine.config import EngineConfig
from octavo.engine.loop import EngineLoop


@contextlib.contextmanager
def fake_server(harness, **settings):
    """The fake engine behind a listening server; → (the engine's client, URL of the API)."""
    engine = build_engine(EngineConfig(model="fake", max_num_seqs=8))
    loops = []

    def start(on_deltas):
        loops.append(EngineLoop(engine.core, on_deltas))
        loops[0].start()
        return loops[0]

    client = LocalEngineClient(engine.info, start)
    try:
        with harness.server(client, served_model_names=("fake",), **settings) as url:
            yield client, f"{url}/v1"
    finally:
        loops[0].stop()


def talk(number):
    return {
        "model": "fake",
        "messages": [{"role": "user", "content": f"Question {number} " * (1 + number % 5)}],
        "max_tokens": 20 + 7 * number,
        "temperature": 0.8,
        "seed": number,
    }


async def test_sixteen_mixed_requests_with_cancellations(harness):
    with fake_server(harness, api_keys=("key",)) as (engine, url):
        async with openai.AsyncOpenAI(base_url=url, api_key="key", max_retries=0, timeout=30) as api:
            alone = [(await api.chat.completions.create(**talk(number))).choices[0] for number in range(16)]

            async def whole(number):
                answer = await api.chat.completions.create(**talk(number))
                return answer.choices[0].message.content, answer.choices[0].finish_reason

            async def streamed(number):
                parts, reason, usage = [], None, None
                async for chunk in await api.chat.completions.create(
                    **talk(number), stream=True, stream_options={"include_usage": True}
                ):
                    usage = chunk.usage or usage
                    for choice in chunk.choices:
                        parts.append(choice.delta.content or "")
                        reason = choice.finish_reason or reason
                assert usage.completion_tokens > 0
                return "".join(parts), reason

            async def left(number):
                stream = await api.chat.completions.create(**{**talk(number), "max_tokens": 3000}, stream=True)
                parts = []
                async for chunk in stream:
                    parts.append(chunk.choices[0].delta.content or "")
                    if len(parts) == 5:
                        break
                await stream.close()
                text, reason = alone[number].message.content, alone[number].finish_reason
                assert text.startswith("".join(parts)) or reason == "length"
                return text, reason

            async def cancelled(number):
                task = asyncio.create_task(api.chat.completions.create(**{**talk(number), "max_tokens": 3000}))
                await asyncio.sleep(0.01 * number)
                task.cancel()
                await asyncio.wait([task])
                return alone[number].message.content, alone[number].finish_reason

            ways = (whole, streamed, left, cancelled, streamed)
            answers = await asyncio.gather(*(ways[number % len(ways)](number) for number in range(16)))
            assert answers == [(choice.message.content, choice.finish_reason) for choice in alone]
        for _ in range(400):
            (stats,) = (await engine.stats()).values()
            if stats.kv_blocks_held == 0:
                break
            await asyncio.sleep(0.005)
        assert (stats.num_running, stats.num_waiting, stats.kv_blocks_held) == (0, 0, 0)


async def test_completions_and_models(harness):
    with fake_server(harness) as (_, url):
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as api:
            models = [model.id async for model in api.models.list()]
            one = await api.models.retrieve("fake")
            several = await api.completions.create(
                model="fake", prompt=["one", "two"], n=2, max_tokens=5, seed=1, logprobs=1, extra_body={"top_k": 4}
            )
            texts = {}
            async for chunk in await api.completions.create(
                model="fake", prompt=["one", "two"], n=2, max_tokens=5, seed=1, stream=True
            ):
                for choice in chunk.choices:
                    texts[choice.index] = texts.get(choice.index, "") + choice.text
    assert models == [one.id] == ["fake"]
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert {choice.index: choice.text for choice in several.choices} == texts
    assert all(len(choice.logprobs.tokens) == 5 for choice in several.choices)


async def test_errors_as_the_client_raises_them(harness):
    hi = [{"role": "user", "content": "Hi"}]
    with harness.server(harness.Client(), api_keys=("key",)) as url:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0) as api:
            with pytest.raises(openai.NotFoundError) as missing:
                await api.chat.completions.create(model="gpt-5", messages=hi)
            with pytest.raises(openai.BadRequestError) as bad:
                await api.chat.completions.create(model="scripted", messages=hi, temperature=-1)
            with pytest.raises(openai.BadRequestError) as later:
                await api.chat.completions.create(
                    model="scripted", messages=hi, prediction={"type": "content", "content": "x"}
                )
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as api:
            with pytest.raises(openai.AuthenticationError):
                await api.models.list()
    assert missing.value.code == "model_not_found"
    assert bad.value.param == "temperature"
    assert later.value.param == "prediction"
    assert "not supported yet" in str(later.value)


async def test_an_error_in_a_stream_is_raised(harness):
    from octavo.cluster.ingress.client import ReplicaLost

    client = harness.Client(fail_after=(3, ReplicaLost("The replica is gone.")))
    with harness.server(client) as url:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as api:
            stream = await api.chat.completions.create(
                model="scripted", messages=[{"role": "user", "content": "Hi"}], stream=True
            )
            with pytest.raises(openai.APIError, match=re.escape("The replica is gone.")):
                async for _ in stream:
                    pass


async def test_overload_is_retried_by_the_client(harness):
    from octavo.engine.errors import CapacityError

    client = harness.Client(fail=CapacityError("Full.", 1))
    with harness.server(client) as url:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=2) as api:
            call = asyncio.create_task(
                api.chat.completions.create(model="scripted", messages=[{"role": "user", "content": "Hi"}])
            )
            await harness.eventually(lambda: len(client.seen) == 1)
            client.fail = None
            answer = await call
    assert answer.choices[0].message.content == "Hello, world"
    assert len({request.request_id for request in client.seen}) == 2

"""octavo.cluster.client against a server with a scripted engine: values, errors, cancellation, what it imports."""

import asyncio
import json
import pickle
import subprocess
import sys

import pytest
from fakes import until

from octavo.cluster.client import (
    Cancelled,
    Client,
    DeadlineExceeded,
    ServerFailed,
    Unauthorized,
    Unavailable,
)
from octavo.cluster.client.requests import generation_request
from octavo.cluster.ingress.client import ReplicaLost
from octavo.cluster.machine import free_ports
from octavo.engine.beam import Beams
from octavo.engine.errors import CapacityError, NotFoundError, RequestError, StepError
from octavo.engine.grammar.spec import StructuredOutputs

CHAT = [{"role": "user", "content": "Hi"}]


async def threaded(function, *args, **kwargs):
    return await asyncio.to_thread(function, *args, **kwargs)


async def test_values(harness):
    engine = harness.Client(replies=("Hello", "World"))
    async with harness.serving(engine, harness.Client(replies=("2nd",))) as server:
        client = server.client
        params = {"n": 2, "logprobs": 1, "prompt_logprobs": 0, "seed": 3, "max_tokens": 20}
        answer = await client.generate("Hi", model="other-name", return_token_ids=True, **params)
        assert [output.text for output in answer.outputs] == ["Hello", "World"]
        assert (answer.text, answer.model, answer.outputs[0].finish_reason) == ("Hello", "scripted", "stop")
        assert bytes(answer.outputs[0].token_ids[:-1]) == b"Hello"
        assert answer.outputs[0].logprobs[0].token.text == "H"
        assert len(answer.outputs[0].logprobs[0].top) == 1
        assert (answer.prompt.logprobs[0], answer.prompt.logprobs[1].top) == (None, ())
        assert answer.usage.completion_tokens == 12
        chunks = [chunk async for chunk in client.stream(CHAT, model="scripted", stop="lo")]
        assert "".join(chunk.text for chunk in chunks) == "Hel"
        assert chunks[-1].outputs[0].stop_reason == "lo"
        assert chunks[-1].usage is not None
        assert (await client.generate([1, 2, 3], model="second")).text == "2nd"
        tokens = await client.tokenize("Hi", model="scripted", texts=True)
        assert tokens.texts[-2:] == ("H", "i")
        assert len((await client.tokenize(CHAT, model="scripted")).token_ids) > len(tokens.token_ids)
        assert [model.name for model in await client.models()] == ["scripted", "other-name", "second"]


async def test_the_synchronous_client_is_the_same(harness):
    async with harness.serving(harness.Client()) as server:
        with Client(server.address) as client:
            whole = await threaded(client.generate, "Hi", temperature=0)
            chunks = await threaded(lambda: list(client.stream("Hi", temperature=0)))
            assert "".join(chunk.text for chunk in chunks) == whole.text == "Hello, world"
            assert (await threaded(client.models))[0].max_model_len == harness.info.max_model_len
            assert len((await threaded(client.tokenize, "Hi")).token_ids) >= 2
            with pytest.raises(RequestError) as caught:
                await threaded(client.generate, "Hi", top_p=2.0)
            assert caught.value.param == "top_p"


@pytest.mark.parametrize(
    ("error", "kind", "retry_after_s"),
    [
        (CapacityError("full", 9), CapacityError, 9),
        (ReplicaLost("gone"), Unavailable, 1),
        (StepError("bug"), ServerFailed, None),
    ],
)
async def test_errors_are_octavos(harness, error, kind, retry_after_s):
    async with harness.serving(harness.Client(fail=error), request_timeout_s=5) as server:
        with pytest.raises(kind) as caught:
            await server.client.generate("Hi")
        assert getattr(caught.value, "retry_after_s", None) == retry_after_s
        with pytest.raises(kind):
            _ = [chunk async for chunk in server.client.stream("Hi")]
        with pytest.raises(NotFoundError) as missing:
            await server.client.generate("Hi", model="nobody")
        assert missing.value.param == "model"
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (type(copy), str(copy)) == (kind, str(caught.value))


async def test_keys_and_nobody_there(harness):
    async with harness.serving(harness.Client(), api_keys=("k",), api_key="k") as server:
        assert (await server.client.generate("Hi")).text
        with Client(server.address, api_key="wrong") as client, pytest.raises(Unauthorized):
            await threaded(client.models)
    (port,) = free_ports(1)
    with Client(f"127.0.0.1:{port}") as client, pytest.raises(Unavailable):
        await threaded(client.models, timeout_s=5)


async def test_deadline_and_giving_up(harness):
    engine = harness.Client(hang_after=2)
    async with harness.serving(engine) as server:
        with pytest.raises(DeadlineExceeded):
            await server.client.generate("Hi", timeout_s=0.2)
        with pytest.raises(DeadlineExceeded):
            _ = [chunk async for chunk in server.client.stream("Hi", timeout_s=0.2)]
        await until(lambda: engine.live == 0)
        stream = server.client.stream("Hi")
        await anext(stream)
        assert engine.live == 1
        await stream.aclose()
        await until(lambda: engine.live == 0, 1)
        waiting = asyncio.create_task(server.client.generate("Hi"))
        await until(lambda: engine.live == 1)
        waiting.cancel()
        await until(lambda: engine.live == 0, 1)
        with Client(server.address) as client:
            chunks = client.stream("Hi")
            await threaded(next, chunks)
            assert engine.live == 1
            await threaded(chunks.close)
            await until(lambda: engine.live == 0, 1)
            reading = asyncio.create_task(threaded(lambda: list(client.stream("Hi"))))
            await until(lambda: engine.live == 1)
        with pytest.raises(Cancelled):  # by closing the client
            await reading
        await until(lambda: engine.live == 0, 1)


async def test_searches_are_asked_for(harness):
    engine = harness.Client()
    async with harness.serving(engine) as server:
        beams = {"width": 4, "early_stopping": "never"}
        answer = await server.client.generate("Hi", n=2, beams=beams, max_tokens=20)
        await server.client.generate("Hi", logprobs=0, logprob_token_ids=[5, 6])
    assert len(answer.outputs) == 2
    assert engine.seen[0].params.beams == Beams(4, 1.0, "never")
    assert engine.seen[1].params.logprob_token_ids == (5, 6)


async def test_forms_are_asked_for(harness):
    engine = harness.Client()
    async with harness.serving(engine) as server:
        for form in ({"json": {"type": "object"}}, {"choice": ["a", "b"]}, {"regex": "a+"}):
            await server.client.generate("Hi", structured_outputs=form)
        with pytest.raises(RequestError) as caught:
            await server.client.generate("Hi", structured_outputs={"regex": "a("})
    assert caught.value.param == "structured_outputs.regex"
    assert [seen.params.structured_outputs for seen in engine.seen] == [
        StructuredOutputs(json='{"type": "object"}'),
        StructuredOutputs(choice=("a", "b")),
        StructuredOutputs(regex="a+"),
    ]


@pytest.mark.parametrize(
    ("prompt", "params", "field"),
    [
        ("Hi", {"structured_outputs": {"regexp": "a"}}, "structured_outputs"),
        ("Hi", {"structured_outputs": {"regex": 5}}, "structured_outputs.regex"),
        ("Hi", {"tempreature": 1}, "tempreature"),
        ("Hi", {"temperature": "hot"}, "temperature"),
        ("Hi", {"n": -1}, "n"),
        ("Hi", {"logit_bias": {"x": 1}}, "logit_bias"),
        ("Hi", {"stop": [1]}, "stop"),
        ([-1], {}, "prompt"),
        (["a"], {}, "prompt"),
        ([{"role": "user", "text": "x"}], {}, "messages"),
        ([{"role": "user", "content": 1}], {}, "messages"),
    ],
)
def test_what_no_request_can_say(prompt, params, field):
    with pytest.raises(RequestError) as caught:
        generation_request(prompt, params)
    assert caught.value.param == field


def test_it_needs_neither_ray_nor_torch():
    code = (
        "import sys, json, octavo.cluster.client as c;"
        "c.Client('127.0.0.1:1').close();"
        "print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    )
    found = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout)
    assert not {"ray", "torch", "transformers", "numpy", "starlette", "pydantic"} & set(found)

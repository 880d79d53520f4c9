"""`octavo serve --grpc-port` with two models, as its clients see it: the same answers as over HTTP, and nothing kept of
those who leave.
"""

import asyncio
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import grpc
import httpx
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from octavo.cluster import machine
from octavo.cluster.client import AsyncClient, DeadlineExceeded, Unauthorized
from octavo.engine.errors import CapacityError, NotFoundError, RequestError
from octavo.protos.octavo.v1 import inference_pb2, inference_pb2_grpc

pytestmark = pytest.mark.live

KEY = {"Authorization": "Bearer key"}
DEPLOYMENT = """
api_key: [key]
models:
  - {model: fake, served_model_name: [a], engine: {max_num_seqs: 2, max_num_queued_reqs: 2}, drain_timeout_s: 2}
  - {model: fake, served_model_name: [b], engine: {max_model_len: 512}, drain_timeout_s: 2}
"""
LONG = {"temperature": 0, "ignore_eos": True, "max_tokens": 3000}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """`http`: a URL; `target`: gRPC's host:port."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "two.yaml").write_text(DEPLOYMENT)
    port, grpc_port = machine.free_ports(2)
    log = folder / "log"
    ports = ["--port", str(port), "--grpc-port", str(grpc_port)]
    command = [sys.executable, "-m", "octavo.cluster.cli", "serve", "--config", str(folder / "two.yaml"), *ports]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while "Ctrl-C stops" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield SimpleNamespace(
            http=f"http://127.0.0.1:{port}", target=f"127.0.0.1:{grpc_port}", process=process, log=log
        )
    finally:
        started = machine._descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            for pid in (*started, process.pid):
                os.kill(pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
async def client(server):
    async with AsyncClient(server.target, api_key="key") as client:
        yield client


@pytest.fixture
async def http(server):
    async with httpx.AsyncClient(base_url=server.http, headers=KEY, timeout=30) as http:
        yield http


async def metric(http, name, model="a"):
    text = (await http.get("/metrics")).text
    lines = [line for line in text.splitlines() if line.startswith(f"octavo:{name}{{") and f'"{model}"' in line]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


async def becomes(http, name, value, within_s=1.0):
    deadline = time.monotonic() + within_s
    while (found := await metric(http, name)) != value:
        assert time.monotonic() < deadline, (name, found)
        await asyncio.sleep(0.02)


async def whole(stream):
    chunks = [chunk async for chunk in stream]
    return "".join(chunk.text for chunk in chunks), chunks[-1]


@pytest.mark.parametrize("params", [{"temperature": 0}, {"seed": 5}, {"seed": 1, "stop": "e"}, {"seed": 2, "n": 3}])
async def test_unary_stream_and_http_give_one_answer(client, http, params):
    asked = {"model": "a", "max_tokens": 60, **params}
    unary = await client.generate("Once upon a time", **asked)
    chunks = [chunk async for chunk in client.stream("Once upon a time", **asked)]
    body = (await http.post("/v1/completions", json={"prompt": "Once upon a time", **asked})).json()
    texts = [choice["text"] for choice in sorted(body["choices"], key=lambda choice: choice["index"])]
    assert [output.text for output in unary.outputs] == texts
    for index, text in enumerate(texts):
        parts = [output for chunk in chunks for output in chunk.outputs if output.index == index]
        assert "".join(part.text for part in parts) == text
        assert parts[-1].finish_reason == unary.outputs[index].finish_reason == body["choices"][index]["finish_reason"]
        assert parts[-1].stop_reason == body["choices"][index]["stop_reason"]
    assert chunks[-1].usage.completion_tokens == unary.usage.completion_tokens == body["usage"]["completion_tokens"]


async def test_conversations_and_models(client, http):
    messages = [{"role": "user", "content": "Hello!"}]
    over_http = await http.post(
        "/v1/chat/completions", json={"model": "b", "messages": messages, "max_tokens": 20, "temperature": 0}
    )
    answer = await client.generate(messages, model="b", max_tokens=20, temperature=0)
    assert answer.text == over_http.json()["choices"][0]["message"]["content"]
    assert {model.name: model.max_model_len for model in await client.models()} == {"a": 4096, "b": 512}
    assert (await client.tokenize("Hi", model="b", add_special_tokens=False)).token_ids == (72, 105)


async def test_errors(server, client):
    with pytest.raises(RequestError) as caught:
        await client.generate("Hi", model="b", max_tokens=5000)
    assert caught.value.param == "max_tokens"
    with pytest.raises(RequestError) as caught:
        await whole(client.stream("Hi", model="a", top_p=7))
    assert caught.value.param == "top_p"
    with pytest.raises(NotFoundError):
        await whole(client.stream("Hi", model="c"))
    messages = []
    async with grpc.aio.insecure_channel(server.target) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        call = stub.Generate(inference_pb2.GenerationRequest(text="Hi"))
        with pytest.raises(grpc.aio.AioRpcError) as status:
            messages.append(await call.read())
    assert (status.value.code(), messages) == (grpc.StatusCode.UNAUTHENTICATED, [])  # gRPC may retry by itself
    with pytest.raises(RequestError):
        await client.generate("Hi")  # which of the two?
    async with AsyncClient(server.target, api_key="no") as stranger:
        with pytest.raises(Unauthorized):
            await whole(stranger.stream("Hi", model="a"))


async def test_who_leaves_frees_the_engine(client, http):
    for leave in ("close", "deadline", "cancel"):
        stream = client.stream("Hi", model="a", timeout_s=1.0 if leave == "deadline" else 60, **LONG)
        assert (await anext(stream)).text
        assert await metric(http, "kv_cache_usage_perc") > 0
        if leave == "close":
            await stream.aclose()
        elif leave == "deadline":
            with pytest.raises(DeadlineExceeded):
                await whole(stream)
        else:
            reading = asyncio.create_task(whole(stream))
            await asyncio.sleep(0.05)
            reading.cancel()
        await becomes(http, "kv_cache_usage_perc", 0)
    with pytest.raises(DeadlineExceeded):
        await client.generate("Hi", model="a", timeout_s=0.3, **LONG)
    await becomes(http, "kv_cache_usage_perc", 0)


async def test_overload(client, http):
    running = [asyncio.create_task(client.generate("Hi", model="a", **LONG)) for _ in range(2)]
    await becomes(http, "num_requests_running", 2, 5)
    waiting = [asyncio.create_task(client.generate("Hi", model="a", **LONG)) for _ in range(2)]
    await becomes(http, "num_requests_waiting", 2, 5)
    for refused in (client.generate("Hi", model="a"), whole(client.stream("Hi", model="a"))):
        with pytest.raises(CapacityError) as caught:
            await refused
        assert caught.value.retry_after_s >= 1
    assert (await client.generate("Hi", model="b", max_tokens=5)).text  # the other model has its own queue
    for task in (*running, *waiting):
        task.cancel()
    await becomes(http, "num_requests_running", 0)
    await becomes(http, "num_requests_waiting", 0)


async def test_a_slow_reader_keeps_nobody_waiting(client, http):
    asked = {**LONG, "model": "a", "max_tokens": 1500}
    slow = client.stream("Hi", **asked)
    first = (await anext(slow)).text
    expected = await client.generate("Hi", **asked)  # beside it, and as quick
    await becomes(http, "num_requests_running", 0, 10)  # the engine is done with what has not been read
    rest, last = await whole(slow)
    assert first + rest == expected.text
    assert last.usage.completion_tokens == expected.usage.completion_tokens == 1500


async def test_health_and_reflection(server):
    with grpc.insecure_channel(server.target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "octavo.v1.Inference", "a", "b"):
            asked = health_pb2.HealthCheckRequest(service=service)
            assert (await asyncio.to_thread(health.Check, asked)).status == health_pb2.HealthCheckResponse.SERVING
        watch = health.Watch(health_pb2.HealthCheckRequest())
        assert (await asyncio.to_thread(next, watch)).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()

        def reflected():
            database = ProtoReflectionDescriptorDatabase(channel)
            service = DescriptorPool(database).FindServiceByName("octavo.v1.Inference")
            return set(database.get_services()), {method.name for method in service.methods}

        services, methods = await asyncio.to_thread(reflected)
    assert services >= {"octavo.v1.Inference", "grpc.health.v1.Health"}
    assert methods == {"Generate", "GenerateUnary", "Tokenize", "ListModels"}


async def test_a_server_that_stops_ends_its_watches_and_finishes_its_streams(server, client):
    """The last test: it stops the server."""
    asked = {"model": "b", "temperature": 0, "ignore_eos": True, "max_tokens": 200}
    expected = await client.generate("Hi", **asked)
    async with grpc.aio.insecure_channel(server.target) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        stream = client.stream("Hi", **asked)
        first = await anext(stream)
        server.process.send_signal(signal.SIGTERM)
        rest, last = await whole(stream)
        assert first.text + rest == expected.text
        assert last.usage is not None
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert await watch.read() is grpc.aio.EOF
    assert await asyncio.to_thread(server.process.wait, 30) == 0
    assert "Traceback" not in server.log.read_text()

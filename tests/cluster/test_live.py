"""The application on a Ray cluster of its own: handle, side channel, cancellation, errors, a killed replica, HTTP."""

import asyncio
import time

import httpx
import pytest
import ray
from fakes import until
from ray import serve

from octavo.cluster.app import APP, build_app
from octavo.cluster.client import AsyncClient, DeadlineExceeded
from octavo.cluster.ingress.client import ReplicaLost
from octavo.cluster.ingress.grpc.register import SERVICER_FUNCTIONS
from octavo.cluster.machine import free_ports
from octavo.cluster.routing.client import ServeEngineClient
from octavo.cluster.token_receiver import TokenReceiver
from octavo.engine.errors import CapacityError, NotFoundError, RequestError
from octavo.engine.params import SamplingParams
from octavo.engine.types import Request

pytestmark = pytest.mark.live

ENGINE = "engine-fake"
ARGS = {"model": "fake", "engine": {"max_num_seqs": 2, "max_num_queued_reqs": 3}, "drain_timeout_s": 5}
TARGET: list[str] = []  # gRPC's, once there is one


@pytest.fixture(scope="module")
def url():
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR")
    port, grpc_port = free_ports(2)
    grpc_options = {"port": grpc_port, "grpc_servicer_functions": list(SERVICER_FUNCTIONS)}
    serve.start(http_options={"host": "127.0.0.1", "port": port}, grpc_options=grpc_options)
    serve.run(build_app(ARGS), name=APP, route_prefix="/")
    TARGET.append(f"127.0.0.1:{grpc_port}")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


@pytest.fixture
async def client(url):
    """An ingress of the test's own, beside the deployed one."""
    receiver = TokenReceiver()
    await receiver.start("127.0.0.1")
    yield ServeEngineClient(serve.get_deployment_handle(ENGINE, APP), receiver)
    await receiver.stop()


def request(request_id="r", max_tokens=10, **params):
    given = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **{"temperature": 0.0, "seed": 1, **params})
    return Request(request_id, tuple(b"Once upon a time"), given)


async def collect(client, given):
    return [delta async for delta in client.generate(given)]


async def stats_become(client, **wanted):
    """Wait until the engine's stats are so."""
    deadline = time.monotonic() + 5
    while True:
        (stats,) = (await client.stats()).values()
        if all(getattr(stats, name) == value for name, value in wanted.items()):
            return
        assert time.monotonic() < deadline, stats
        await asyncio.sleep(0.01)


async def idle(client):
    await stats_become(client, num_running=0, num_waiting=0, kv_blocks_held=0)


async def test_tokens_come_through(client, url):
    info = await client.info()
    assert (info.model, info.max_model_len) == ("fake", 4096)
    deltas = await collect(client, request(max_tokens=40))
    tokens = [token for delta in deltas for token in delta.token_ids]
    assert len(tokens) == 40
    assert deltas[-1].finish_reason == "length"
    body = {"prompt": list(b"Once upon a time"), "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    async with httpx.AsyncClient() as http:
        over_http = await http.post(f"{url}/v1/completions", json=body)
    assert over_http.json()["choices"][0]["text"] == bytes(tokens).decode()
    both = await asyncio.gather(collect(client, request("a")), collect(client, request("b", n=2, temperature=1.0)))
    assert [sum(delta.finish_reason == "length" for delta in deltas) for deltas in both] == [1, 2]


async def test_a_batch_of_texts_is_pooled_in_spite_of_a_short_queue(url):
    texts = [f"Text number {i}." for i in range(300)]
    async with httpx.AsyncClient(timeout=30) as http:
        answer = await http.post(f"{url}/v1/embeddings", json={"input": texts})
        alone = await http.post(f"{url}/v1/embeddings", json={"input": texts[123]})
    vectors = [entry["embedding"] for entry in answer.json()["data"]]
    assert len({tuple(vector) for vector in vectors}) == 300
    assert vectors[123] == alone.json()["data"][0]["embedding"]


async def test_a_cancelled_request_is_freed_running_or_queued(client):
    running = [client.generate(request(f"run-{i}", max_tokens=4000)) for i in range(2)]
    for stream in running:
        await anext(stream)
    queued = asyncio.create_task(collect(client, request("queued", max_tokens=4000)))
    await stats_become(client, num_waiting=1)
    queued.cancel()
    await stats_become(client, num_waiting=0)
    await stats_become(client, num_running=2)
    started = time.monotonic()
    for stream in running:
        await stream.aclose()
    await idle(client)
    assert time.monotonic() - started < 1.0


async def test_errors_stay_typed(client, url):
    with pytest.raises(RequestError) as caught:
        await collect(client, request(stop_token_ids=(9999,)))
    assert caught.value.param == "stop_token_ids"
    tasks = [asyncio.create_task(collect(client, request(f"full-{i}", max_tokens=4000))) for i in range(2)]
    await stats_become(client, num_running=2)
    tasks += [asyncio.create_task(collect(client, request(f"wait-{i}", max_tokens=4000))) for i in range(3)]
    await stats_become(client, num_waiting=3)
    with pytest.raises(CapacityError):
        await collect(client, request("one-too-many"))
    async with httpx.AsyncClient() as http:
        refused = await http.post(f"{url}/v1/completions", json={"prompt": "x"})
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await idle(client)


async def test_a_client_that_hangs_up(client, url):
    body = {"prompt": "x", "max_tokens": 4000, "stream": True, "ignore_eos": True}
    async with httpx.AsyncClient() as http, http.stream("POST", f"{url}/v1/completions", json=body) as response:
        lines = response.aiter_lines()
        assert (await anext(lines)).startswith("data: ")
        await stats_become(client, num_running=1)
    await idle(client)


async def test_grpc_through_serves_own_proxy(client, url):
    """What differs from HAProxy: the call reaches the ingress through a handle."""
    asked = {"temperature": 0, "ignore_eos": True}
    async with AsyncClient(TARGET[0]) as rpc:
        whole = await rpc.generate("Once", max_tokens=30, **asked)
        chunks = [chunk async for chunk in rpc.stream("Once", max_tokens=30, **asked)]
        assert "".join(chunk.text for chunk in chunks) == whole.text
        assert chunks[-1].usage.completion_tokens == 30
        for bad, kind in (({"top_p": 3}, RequestError), ({"model": "x"}, NotFoundError)):
            with pytest.raises(kind) as caught:
                await rpc.generate("Once", **bad)
            with pytest.raises(kind) as streamed:
                _ = [chunk async for chunk in rpc.stream("Once", **bad)]
            assert caught.value.param == streamed.value.param == next(iter(bad))
        for number in range(6):  # the proxy may be waiting for a message then, or sending one
            stream = rpc.stream("Once", max_tokens=4000, **asked)
            for _ in range(1 + 5 * number):
                await anext(stream)
            await stream.aclose()
            await idle(client)
        with pytest.raises(DeadlineExceeded):
            _ = [chunk async for chunk in rpc.stream("Once", max_tokens=4000, timeout_s=0.3, **asked)]
        await idle(client)


async def test_health(client, url):
    await serve.get_deployment_handle(ENGINE, APP).check_health.remote()
    async with httpx.AsyncClient() as http:
        assert (await http.get(f"{url}/health")).status_code == 200


async def test_a_killed_replica_is_lost_at_once_and_replaced(client, url):
    stream = client.generate(request("doomed", max_tokens=4000))
    await anext(stream)
    (name,) = [
        actor["name"]
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["name"].startswith(f"SERVE_REPLICA::{APP}#{ENGINE}#")
    ]
    started = time.monotonic()
    ray.kill(ray.get_actor(name, namespace="serve"))
    with pytest.raises(ReplicaLost):
        async for _ in stream:
            pass
    assert time.monotonic() - started < 5
    await until(lambda: httpx.get(f"{url}/health").status_code == 200, 20)
    assert (await collect(client, request("after")))[-1].finish_reason == "length"

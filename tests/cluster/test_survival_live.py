"""Replicas that die, hang, fail and are replaced while streams run: not a token is lost, repeated or changed."""

import asyncio
import json
import os
import signal
import time

import fakes
import httpx
import psutil
import pytest
import ray
from fakes import until
from ray import serve

from octavo.cluster import app, failures
from octavo.cluster.app import APP, build_app, node_address
from octavo.cluster.machine import free_ports
from octavo.cluster.routing.client import ServeEngineClient
from octavo.cluster.routing.failover import FailoverClient
from octavo.cluster.serve_host import note_broken
from octavo.cluster.token_receiver import TokenReceiver
from octavo.engine.build import build_engine
from octavo.engine.config import EngineConfig
from octavo.engine.params import SamplingParams
from octavo.engine.types import Request

pytestmark = pytest.mark.live

ARGS = {"model": "fake", "num_replicas": 2, "num_cpus": 0, "drain_timeout_s": 4, "hang_timeout_s": 2}
ENGINE = "engine-fake"
LENGTH = 2000
RESUMED: list[float] = []  # when a request of the test at hand was submitted again


@pytest.fixture(scope="module")
def url():
    ray.cloudpickle.register_pickle_by_value(fakes)
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR")
    (port,) = free_ports(1)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(fragile_app(**ARGS), name=APP, route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(fakes)


def fragile_app(**args):
    """The application with replicas whose engine can be broken."""
    with pytest.MonkeyPatch.context() as patch:  # pickling must find the class as it is
        patch.setattr(app, "EngineHost", fakes.fragile(app.EngineHost))
        return build_app(args)


@pytest.fixture
async def client(url):
    """An ingress of the test's own. Both replicas are there."""
    await until(lambda: len(replicas()) == 2 and serve.status().applications[APP].status == "RUNNING", 30)
    receiver = TokenReceiver(note_broken)
    await receiver.start(node_address())
    inner = ServeEngineClient(serve.get_deployment_handle(ENGINE, APP), receiver)
    inner.start()
    await until(lambda: len(receiver.stats) == 2, 10)
    RESUMED.clear()
    yield FailoverClient(inner, 30.0, lambda: RESUMED.append(time.time()))
    await inner.close()
    await receiver.stop()


def replicas() -> dict[int, psutil.Process]:
    """The processes of this cluster's engine replicas, by pid."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            # Ray writes there what the process is, and behind it, while it runs one, the name of a method.
            if "".join(process.cmdline()[:1]).startswith(f"ray::ServeReplica:{APP}:{ENGINE}"):
                found[process.pid] = process
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def request(number: int, length: int = LENGTH) -> Request:
    params = SamplingParams(max_tokens=length, ignore_eos=True, temperature=float(number % 2), seed=number)
    return Request(f"r{number}", tuple(b"Once upon a time %d" % number), params)


@pytest.fixture(scope="module")
def expected():
    core = build_engine(EngineConfig(model="fake")).core
    tokens: dict[str, list[int]] = {f"r{number}": [] for number in range(8)}
    for number in range(8):
        core.add(request(number))
    while core.has_work:
        for delta in core.step():
            tokens[delta.request_id] += delta.token_ids
    return tokens


class Streams:
    """Requests under way, and the longest time between two deltas of one."""

    def __init__(self, client, count: int = 8) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.longest_gap_s = 0.0
        self._tasks = [asyncio.create_task(self._read(client, request(number))) for number in range(count)]

    async def _read(self, client, given: Request) -> None:
        got = self.tokens[given.request_id] = []
        last = time.monotonic()
        async for delta in client.generate(given):
            assert delta.error is None
            got += delta.token_ids
            now = time.monotonic()
            self.longest_gap_s, last = max(self.longest_gap_s, now - last), now

    async def under_way(self) -> None:
        await until(lambda: len(self.tokens) == len(self._tasks) and all(map(len, self.tokens.values())), 10)

    async def all(self) -> dict[str, list[int]]:
        await asyncio.wait_for(asyncio.gather(*self._tasks), 60)
        return self.tokens


def reasons_since(started: float) -> list[str]:
    return [failure.why for failure in failures.recent() if failure.at >= started]


async def disturb(client, expected, disturbance) -> float:
    """All streams are exact although `disturbance` comes in their midst; returns the longest pause in seconds."""
    streams = Streams(client)
    await streams.under_way()
    begun = time.monotonic()
    await disturbance()
    assert await streams.all() == expected
    print(f"longest pause {streams.longest_gap_s:.2f} s, all done after {time.monotonic() - begun:.2f} s")
    return streams.longest_gap_s


async def over_http(url: str, number: int) -> str:
    """The text of a stream of the deployed ingress; the request is number `number`."""
    given = request(number)
    body = {"prompt": list(given.prompt_token_ids), "max_tokens": LENGTH, "ignore_eos": True, "stream": True}
    body |= {"temperature": given.params.temperature, "seed": given.params.seed}
    text = ""
    async with httpx.AsyncClient(timeout=60) as http, http.stream("POST", f"{url}/v1/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
    assert line == "data: [DONE]" or not line
    return text


async def test_a_killed_replica(client, expected, url):
    started, victim = time.time(), next(iter(replicas()))
    streams = [asyncio.create_task(over_http(url, number)) for number in range(4)]

    async def kill():
        os.kill(victim, signal.SIGKILL)

    assert await disturb(client, expected, kill) < 3
    assert [bytes(expected[f"r{number}"]).decode() for number in range(4)] == await asyncio.gather(*streams)
    assert RESUMED
    await until(lambda: len(replicas()) == 2, 10)
    assert any("died" in why for why in reasons_since(started))


async def test_all_replicas_killed(client, expected):
    async def kill():
        for victim in replicas():
            os.kill(victim, signal.SIGKILL)

    await disturb(client, expected, kill)
    await until(lambda: len(replicas()) == 2, 20)


async def test_a_stopped_replica(client, expected):
    victim = next(iter(replicas()))

    async def stop():
        os.kill(victim, signal.SIGSTOP)

    assert await disturb(client, expected, stop) < 5
    await until(lambda: victim not in replicas(), 5)


async def test_a_failed_engine(client, expected):
    started, before = time.time(), set(replicas())
    handle = serve.get_deployment_handle(ENGINE, APP)

    async def fail():
        await handle.break_engine.remote()

    assert await disturb(client, expected, fail) < 3
    await until(lambda: len(set(replicas()) & before) == 1, 5)
    assert any("Rank 3 on node 10.0.0.3 was killed" in why for why in reasons_since(started))


async def test_a_redeploy_cuts_no_stream(client, expected):
    started, before = time.time(), set(replicas())
    other = fragile_app(**ARGS, engine={"max_num_seqs": 17})
    redeploy = asyncio.create_task(asyncio.to_thread(serve.run, other, name=APP, route_prefix="/"))
    waves = []
    while not redeploy.done() or set(replicas()) & before:
        waves.append(Streams(client, 3))
        await asyncio.sleep(1)
    await redeploy
    for wave in waves:
        assert await wave.all() == {name: expected[name] for name in ("r0", "r1", "r2")}
    assert RESUMED  # what was not done by the drain deadline went on elsewhere
    # Whoever begins while a process of the old version ends may wait for Ray, up to 2 s where cores are few.
    gaps = sorted(wave.longest_gap_s for wave in waves)
    assert gaps[len(gaps) // 2] < 0.5
    assert gaps[-1] < 3
    assert reasons_since(started) == []

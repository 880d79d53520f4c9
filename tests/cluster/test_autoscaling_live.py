"""Autoscaling on a cluster: one replica, two under load, one again, none, and back for a request that waits."""

import asyncio
import time

import httpx
import pytest
import ray
from ray import serve

from octavo.cluster.app import APP, build_app
from octavo.cluster.machine import free_ports

pytestmark = pytest.mark.live

ARGS = {
    "model": "fake:step_ms=20",
    "num_cpus": 0.1,
    "drain_timeout_s": 4,
    "engine": {"max_num_seqs": 2},
    "autoscaling": {
        "min_replicas": 0,
        "max_replicas": 2,
        "target_queued_tokens": 40,
        "upscale_delay_s": 0.5,
        "downscale_delay_s": 1,
        "downscale_to_zero_delay_s": 1.5,
        "look_back_period_s": 2,
    },
}


@pytest.fixture(scope="module")
def url():
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR")
    (port,) = free_ports(1)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build_app(ARGS), name=APP, route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


def replicas():
    return serve.status().applications[APP].deployments["engine-fake"].replica_states.get("RUNNING", 0)


async def become(wanted, within_s=30):
    deadline = time.monotonic() + within_s
    while await asyncio.to_thread(replicas) != wanted:
        assert time.monotonic() < deadline, (wanted, replicas())
        await asyncio.sleep(0.2)


async def ask(http, url, number=0, max_tokens=50):
    body = {"prompt": f"Once upon a time, {number}", "max_tokens": max_tokens, "ignore_eos": True}
    answer = await http.post(f"{url}/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == max_tokens
    return answer


async def test_there_and_back(url):
    async with httpx.AsyncClient(timeout=60) as http:
        await ask(http, url, max_tokens=1)
        assert replicas() == 1
        load = [asyncio.create_task(ask(http, url, number)) for number in range(16)]
        await become(2)
        await asyncio.gather(*load)  # no request is lost on the way up …
        slow = asyncio.create_task(ask(http, url, max_tokens=150))
        await become(1)  # … nor on the way down
        await slow
        await become(0)
        for path in ("health", "ready", "metrics", "v1/models"):  # who only looks brings nothing back
            assert (await http.get(f"{url}/{path}")).status_code == 200, path
        await asyncio.sleep(2)
        assert replicas() == 0
        answers = await asyncio.gather(*(ask(http, url, number, max_tokens=5) for number in range(3)))
        assert len(answers) == 3
        assert replicas() == 1

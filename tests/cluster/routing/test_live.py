"""Routing on a Ray cluster: three replicas, and the test's process as their ingress."""

import asyncio
import contextlib
import pickle
import random
import time

import pytest
import ray
from ray import serve
from ray.serve.context import _RequestContext, _serve_request_context
from ray.serve.request_router import RunningReplica

from octavo.cluster.app import engine_name, engine_pool
from octavo.cluster.config import ModelConfig
from octavo.cluster.routing.client import ServeEngineClient
from octavo.cluster.routing.fleet import Fleet
from octavo.cluster.routing.policies import Load, keep_session, make_policy
from octavo.cluster.routing.router import Call
from octavo.cluster.token_receiver import TokenReceiver
from octavo.engine.core.prefix import Chain
from octavo.engine.params import SamplingParams
from octavo.engine.types import Request

pytestmark = pytest.mark.live

APP = "routing"
BLOCKS = 200
MODEL = ModelConfig.from_mapping(
    {
        "model": "fake",
        "num_replicas": 3,
        "num_cpus": 0.1,
        "engine": {"num_gpu_blocks_override": BLOCKS, "max_model_len": 2048, "block_size": 16},
    }
)


@pytest.fixture(scope="module")
def pool():
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR")
    serve.start(proxy_location="Disabled")
    serve.run(engine_pool(MODEL, "warning"), name=APP, route_prefix=None)
    yield
    serve.shutdown()
    ray.shutdown()


class Ingress:
    """What an ingress process has for one model."""

    async def start(self):
        self.receiver = TokenReceiver()
        await self.receiver.start("127.0.0.1")
        self.fleet = Fleet(make_policy("prefix"), 1 << 16)
        self.client = ServeEngineClient(serve.get_deployment_handle(engine_name(MODEL), APP), self.receiver, self.fleet)
        self.client.start()
        await until(lambda: len(self.receiver.stats) == len(self.fleet.replicas) >= 2, 20)
        return self

    async def stop(self):
        await self.client.close()
        await self.receiver.stop()

    async def send(self, prompt, max_tokens=2, **request):
        """(the replica that had the request, tokens it found cached)"""
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0.0, seed=1)
        replicas, cached = [], 0
        async for delta in self.client.attempt(Request("r", tuple(prompt), params, **request), replicas.append):
            cached = max(cached, delta.num_cached_tokens)
        return replicas[0], cached

    def held(self, prompt):
        """Leading blocks of the prompt at each replica, as the index knows it."""
        return self.fleet.index.match(Chain(tuple(prompt), 16))


@pytest.fixture
async def ingress(pool):
    started = await Ingress().start()
    yield started
    await started.stop()


async def until(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.01)


def text(name, count):
    return random.Random(repr(name)).choices(range(97, 123), k=count)


async def test_requests_go_where_their_beginning_is_cached(ingress):
    first, cached = await ingress.send(text("system", 640))
    assert cached == 0
    await until(lambda: ingress.held(text("system", 640)) == {first: 40})
    for number in range(6):
        assert await ingress.send(text("system", 640) + text(number, 40)) == (first, 640)
    others = {(await ingress.send(text(("other", number), 300)))[0] for number in range(8)}
    assert others - {first}
    assert (await ingress.send(text("system", 640), cache_salt="secret"))[1] == 0
    sample = "octavo:routing_hit_tokens_{}_total"
    found = [
        ingress.fleet.metrics.registry.get_sample_value(sample.format(x), {"model_name": ""})
        for x in ("predicted", "found")
    ]
    assert found == [6 * 640, 6 * 640]


async def test_a_new_ingress_learns_what_the_replicas_hold(ingress):
    replica, _ = await ingress.send(text("known", 800))
    await until(lambda: ingress.held(text("known", 800)) == {replica: 50})
    other = await Ingress().start()
    await until(lambda: other.held(text("known", 800)) == {replica: 50})
    assert await other.send(text("known", 800) + text("tail", 20)) == (replica, 800)
    for each in ingress, other:  # loads of idle replicas are told to all, too
        heard = {replica: stats.steps for replica, stats in each.receiver.stats.items()}
        assert len(heard) == 3
        assert heard[replica] > 0
    await other.stop()


async def test_an_evicted_block_attracts_nobody(ingress):
    replica, _ = await ingress.send(text("forgotten", 640))
    await until(lambda: ingress.held(text("forgotten", 640)) == {replica: 40})
    for number in range(12):  # more than the replica's pool holds, each on top of the one before
        await ingress.send(text(("junk", number), 480), session_id=session_of(ingress, replica))
    await until(lambda: replica not in ingress.held(text("forgotten", 640)))


def session_of(ingress, replica):
    """A session whose own replica is `replica`."""
    loads = [Load(name) for name in ingress.fleet.replicas]
    return next(str(i) for i in range(1000) if keep_session(loads, str(i))[0].replica == replica)


async def test_a_session_stays(ingress):
    replicas = {(await ingress.send(text(number, 50), session_id="someone"))[0] for number in range(6)}
    assert len(replicas) == 1
    for replica in ingress.fleet.replicas:
        assert (await ingress.send(text(replica, 50), session_id=session_of(ingress, replica)))[0] == replica


async def test_no_replica_is_asked_for_its_queue_unless_it_was_unreachable(ingress, monkeypatch):
    asked = []

    async def get_queue_len(self, *, deadline_s):
        asked.append(self.replica_id)
        return 0

    monkeypatch.setattr(RunningReplica, "get_queue_len", get_queue_len)
    router = ingress.client._handle._router._asyncio_router.request_router
    for replica in router.curr_replicas:
        router.replica_queue_len_cache.invalidate_key(replica)  # as after 10 s without a request
    for number in range(9):
        await ingress.send(text(("asked", number), 50))
    assert not asked
    (first, *_) = router.curr_replicas
    router.on_replica_actor_unavailable(first)
    session = session_of(ingress, first.unique_id)
    assert (await ingress.send(text("asked", 50), session_id=session))[0] == first.unique_id
    assert asked == [first]


def test_what_the_router_is_told_is_not_sent():
    call = Call(Fleet(make_policy("prefix"), 10), only="someone")
    assert pickle.loads(pickle.dumps(call)) is None
    assert len(pickle.dumps(call)) < 50


async def test_calls_of_one_http_request_do_not_wait_for_each_other(ingress):
    _serve_request_context.set(_RequestContext(request_id="http", _internal_request_id="one-for-all"))
    async with asyncio.timeout(10):
        await asyncio.gather(*(ingress.send(text(("many", number), 20)) for number in range(8)))


async def test_a_killed_replica_leaves_the_index(ingress):
    replica, _ = await ingress.send(text("doomed", 640))
    await until(lambda: ingress.held(text("doomed", 640)) == {replica: 40})
    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    (name,) = [name for name in names if name.endswith(replica)]
    ray.kill(ray.get_actor(name, namespace="serve"))
    await until(lambda: replica not in ingress.held(text("doomed", 640)), 3)
    other, cached = await ingress.send(text("doomed", 640))
    assert (other != replica, cached) == (True, 0)
    await until(lambda: replica not in ingress.fleet.replicas, 10)
    await until(lambda: len(ingress.fleet.replicas) == 3 == len(ingress.receiver.stats), 20)  # Serve has replaced it
    with contextlib.suppress(ValueError):
        assert ray.get_actor(name, namespace="serve") is None

"""Overload: who would wait too long is told so at once, and the others are served as if there were no more of them."""

import math
import random
import time

import httpx
import pytest

from octavo.cluster.ingress.admission import LONGEST_RETRY_S, Admission
from octavo.cluster.ingress.app import create_app
from octavo.cluster.ingress.client import LocalEngineClient
from octavo.cluster.ingress.service import Service
from octavo.cluster.ingress.settings import IngressSettings
from octavo.cluster.routing.fleet import Fleet, Placing
from octavo.cluster.routing.pace import ENOUGH_S, Pace
from octavo.cluster.routing.policies import make_policy
from octavo.cluster.routing.simulation import Arrival, Replica, Simulation
from octavo.cluster.routing.workloads import poisson, skewed, tokens
from octavo.engine.build import build_engine
from octavo.engine.config import EngineConfig
from octavo.engine.core.prefix import Chain
from octavo.engine.errors import CapacityError
from octavo.engine.loop import EngineLoop
from octavo.engine.runner.fake import CostModel
from octavo.engine.text.byte_tokenizer import ByteTokenizer
from octavo.engine.types import EngineStats

REPLICA = Replica(max_num_seqs=32, cost=CostModel(step_s=0.02, token_s=0.0001))
SLO_TTFT_S, SLO_TPOT_S = 3.0, 0.1
SECONDS = 20.0


class Strangers:
    """Prompts that share nothing, at `rate` per second."""

    def __init__(self, rate, seconds, seed):
        self._rate, self._seconds, self._seed = rate, seconds, seed

    def arrivals(self):
        rng = random.Random(self._seed)
        for at in poisson(rng, self._rate, int(self._rate * self._seconds)):
            yield Arrival(at, tokens(rng, skewed(rng, 200, 1000, 0.5)), rng.randint(20, 60))

    def after(self, arrival, output, now_s):
        return None


def served(rate, seconds, max_queue_wait_s=None, ingresses=1, seed=0):
    """(requests that were served, those that were refused)."""
    fleets = [Fleet(make_policy("least_loaded"), 1000) for _ in range(ingresses)]
    simulation = Simulation(fleets, 2, REPLICA, max_queue_wait_s)
    return simulation.run(Strangers(rate, seconds, seed)), simulation.refused


def goodput(done):
    def tpot(one):
        return (one.end_s - one.arrival.at_s - one.ttft_s) / (one.arrival.max_tokens - 1)

    return sum(one.ttft_s <= SLO_TTFT_S and tpot(one) <= SLO_TPOT_S for one in done) / SECONDS


@pytest.mark.parametrize("ingresses", [1, 3])
def test_goodput_beyond_capacity_is_that_at_capacity(ingresses):
    done, _ = served(1000.0, 1.2)
    capacity = len(done) / max(one.end_s for one in done)
    by_load = {}
    for factor in (0.5, 1, 2, 3):
        done, refused = served(factor * capacity, SECONDS, 2.0, ingresses)
        by_load[factor] = goodput(done)
        assert len(done) + len(refused) == int(factor * capacity * SECONDS)
        if factor < 1:
            assert not refused
    assert by_load[2] >= 0.9 * by_load[1], by_load
    assert by_load[3] >= 0.9 * by_load[1], by_load
    without, _ = served(2 * capacity, SECONDS)
    assert goodput(without) < 0.5 * by_load[1]  # it is the limit that does it


def test_a_pace_counts_only_the_time_in_which_some_wait():
    pace = Pace()
    for second in range(10):  # what comes is taken up at once: that says nothing
        pace.observe(EngineStats(prompt_tokens=10 * second), float(second))
    assert pace.tokens_per_s is None
    assert pace.wait_s(1e9) == 0.0
    for tenth in range(int(ENOUGH_S * 10) + 2):
        pace.observe(EngineStats(prompt_tokens=100 + 50 * tenth, waiting_tokens=700), 10 + tenth / 10)
    assert pace.tokens_per_s == pytest.approx(500)
    assert pace.wait_s(1000) == pytest.approx(2)
    assert pace.wait_s(0) == 0.0
    for second in range(100):  # it has come to a stop
        pace.observe(EngineStats(prompt_tokens=700, waiting_tokens=700), 20.0 + second)
    assert pace.wait_s(700) > 1000


def test_the_shortest_queue_counts_and_what_is_on_its_way():
    fleet = Fleet(make_policy("least_loaded"), 1000)
    assert fleet.expected_wait_s() == 0.0
    fleet.set_replicas({"a": True, "b": True})
    for tenth in range(30):
        for name, waiting in (("a", 3000), ("b", 900)):
            stats = EngineStats(num_waiting=3, prompt_tokens=100 * tenth, waiting_tokens=waiting)
            fleet.observe(name, stats, tenth / 10)
    assert fleet.expected_wait_s() == pytest.approx(0.9)
    for _ in range(4):  # nobody has heard of them yet
        fleet.place(Placing(1000, Chain((1, 2, 3), 16)))
    assert fleet.expected_wait_s() >= 2.0
    fleet.set_replicas({"a": True, "b": True, "c": True})
    assert fleet.expected_wait_s() == 0.0  # a new one has no queue


def test_who_is_sent_away_is_told_for_how_long():
    for wait_s, retry_s in ((30.1, 1), (33.0, 3), (1e6, LONGEST_RETRY_S), (math.inf, LONGEST_RETRY_S)):
        with pytest.raises(CapacityError) as refused:
            Admission(30.0, lambda wait_s=wait_s: wait_s).check()
        assert refused.value.retry_after_s == retry_s
    Admission(30.0, lambda: 30.0).check()
    Admission(None, lambda: math.inf).check()


async def test_over_http():
    engine = build_engine(EngineConfig(model="fake", max_num_seqs=2))
    loops = []

    def start(on_deltas):
        loops.append(EngineLoop(engine.core, on_deltas))
        loops[0].start()
        return loops[0]

    wait_s = 0.0
    settings = IngressSettings(("fake",), max_queue_wait_s=5.0)
    service = Service(settings, LocalEngineClient(engine.info, start), ByteTokenizer(), (), lambda: wait_s)
    transport = httpx.ASGITransport(create_app([service]))
    body = {"prompt": "x" * 100, "max_tokens": 3, "stream": True}
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        assert (await http.post("/v1/completions", json=body)).status_code == 200
        wait_s = 25.0
        began = time.perf_counter()
        refused = await http.post("/v1/completions", json=body)
        assert time.perf_counter() - began < 1.0
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "20"
        assert refused.json()["error"]["code"] == "overloaded"
        metrics = (await http.get("/metrics")).text
        (counted,) = (line for line in metrics.splitlines() if 'reason="max_queue_wait_s"' in line and "_total" in line)
        assert counted.endswith(" 1.0")
        wait_s = 0.0
        assert (await http.post("/v1/completions", json=body)).status_code == 200
    loops[0].stop()


async def test_a_model_that_is_away_is_well_and_its_first_request_waits():
    class Away:
        def __init__(self):
            self.asked = 0

        async def info(self):
            self.asked += 1
            return engine.info

        async def stats(self):
            return {}

    engine = build_engine(EngineConfig(model="fake"))
    client = Away()
    service = Service(IngressSettings(("fake",), may_be_away=True), client, ByteTokenizer())
    transport = httpx.ASGITransport(create_app([service]))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        for path in ("/health", "/ready", "/metrics", "/v1/models", "/ping"):
            assert (await http.get(path)).status_code == 200, path
        assert client.asked == 0  # nothing of that brings the model here
        assert (await http.post("/tokenize", json={"prompt": "hello"})).json()["count"] == 6
        assert client.asked == 1
        assert (await http.get("/v1/models")).json()["data"][0]["max_model_len"] == 4096

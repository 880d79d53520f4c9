"""`octavo status`: what the controller and the replicas say, put together, summed up and shown."""

import io
import json
import time
from dataclasses import replace

import pytest
from fakes import INFO, fake_replica
from rich.console import Console

from octavo.cluster import wire
from octavo.cluster.failures import Failure
from octavo.cluster.overview import Overview, Replica, from_details, rate, ttft
from octavo.cluster.overview_table import hit_rate, render, span
from octavo.cluster.status import to_json
from octavo.engine.types import EngineStats, RankStatus

NODES = {"n1": "10.0.0.1", "n2": "10.0.0.2"}
STATS = EngineStats(
    num_running=4,
    num_waiting=2,
    waiting_tokens=1234,
    kv_blocks_total=100,
    kv_blocks_held=25,
    generation_tokens=5000,
    prefix_queries=200,
    prefix_hits=150,
)
RANKS = tuple(RankStatus(i, i // 2, i % 2, 100 + i, "n1" if i < 2 else "n2", i % 2, 0.25 * i) for i in range(4))
STATUS = wire.ReplicaStatus(INFO, STATS, RANKS, 50.0)


def replica_details(replica_id, state="RUNNING", node="n1"):
    return {"replica_id": replica_id, "state": state, "node_id": node, "pid": 7, "start_time_s": time.time() - 100}


def details(status="RUNNING", message="", replicas=None):
    replicas = replicas or [replica_details("aaaa"), replica_details("bbbb", "STARTING", "n2")]
    deployment = {"status": "UPDATING", "message": "", "target_num_replicas": 2, "replicas": replicas}
    app = {
        "status": status,
        "message": message,
        "last_deployed_time_s": time.time() - 7300,
        "deployments": {"engine-m": deployment},
    }
    return {"proxies": {"n1": {"status": "HEALTHY"}, "n2": {"status": "UNHEALTHY"}}, "applications": {"octavo": app}}


def shown(overview, width=80, trouble=None):
    console = Console(file=io.StringIO(), width=width)
    console.print(render(overview, trouble))
    return console.file.getvalue()


def whole():
    overview = from_details(details(), "octavo", NODES)
    first, second = overview.replicas
    failure = Failure(time.time(), "cccc", "10.0.0.2", "rank 3 (node 10.0.0.2, pid 9) was killed.")
    return replace(
        overview,
        replicas=(replace(first, status=STATUS, tokens_per_s=1234.5, ttft_s=0.0421), second),
        failures=(failure,),
        nodes=tuple(NODES.items()),
    )


def test_status_survives_the_wire():
    assert wire.decode_status(wire.encode_status(STATUS)) == STATUS
    on_cpu = replace(STATUS, ranks=(RankStatus(0, 0, 0, 1),))
    assert wire.decode_status(wire.encode_status(on_cpu)) == on_cpu


async def test_a_replica_says_how_it_is():
    replica = fake_replica()
    try:
        status = wire.decode_status(replica.status())
    finally:
        await replica.close()
    assert status.info == INFO
    assert [(rank.rank, rank.node, rank.gpu) for rank in status.ranks] == [(0, "", None)]
    assert status.ranks[0].pid > 0


def test_from_what_the_controller_says():
    overview = from_details(details(), "octavo", NODES)
    assert overview.app_status == "RUNNING"
    assert [(r.id, r.state, r.node) for r in overview.replicas] == [
        ("aaaa", "RUNNING", "10.0.0.1"),
        ("bbbb", "STARTING", "10.0.0.2"),
    ]
    assert overview.proxies == (("10.0.0.1", "HEALTHY"), ("10.0.0.2", "UNHEALTHY"))
    assert overview.is_well
    assert from_details({"applications": {}}, "octavo", NODES).app_status == "NOT_DEPLOYED"


@pytest.mark.parametrize(
    "changes",
    [
        {"app_status": "DEPLOY_FAILED"},
        {"controller": "Serve's controller does not answer within 4 s"},
        {"replicas": (Replica("a", "engine-m", "RUNNING", trouble="no answer within 2.5 s"),)},
    ],
)
def test_what_is_not_well(changes):
    assert not replace(whole(), **changes).is_well


@pytest.mark.parametrize("width", [80, 120])
def test_the_tables_say_it_all_and_fit(width):
    text = shown(whole(), width)
    assert max(map(len, text.splitlines())) <= width
    for said in ("octavo RUNNING", "deployed 2 h 01 ago", "1,234 tokens/s", "4 running, 2 waiting"):
        assert said in text
    for said in (
        "engine-m UPDATING",
        "1 of 2 replicas",
        "25%",
        "75%",
        "42 ms",
        "STARTING",
        "The proxy on 10.0.0.2 is UNHEALTHY",
    ):
        assert said in text
    rows = [line.split() for line in text.splitlines() if line.endswith("s ago") and "deployed" not in line]
    assert rows[3] == ["3", "1", "1", "10.0.0.2", "103", "1", "0.8", "s", "ago"]
    assert "replica cccc on 10.0.0.2: rank 3 (node 10.0.0.2, pid 9) was killed." in " ".join(text.split())


def test_trouble_is_shown():
    silent = Replica("aaaa", "engine-m", "RUNNING", "10.0.0.1", trouble="no answer within 2.5 s")
    text = shown(replace(whole(), replicas=(silent,)))
    assert "SILENT" in text
    assert "Replica aaaa of engine-m on 10.0.0.1: no answer within 2.5 s" in text
    without = Overview(time.time(), replicas=(replace(silent, trouble=None),), controller="Serve is not running")
    text = shown(without, trouble="Ray does not answer.")
    assert "octavo UNKNOWN" in text
    assert "Serve is not running: nothing is replaced or scaled until it is back." in text
    assert "Ray does not answer." in text
    assert "aaaa" in text


def test_rates_and_spans():
    later = replace(STATUS, clock=52.0, stats=replace(STATS, generation_tokens=5500))
    assert rate(later, STATUS) == 250.0
    assert rate(STATUS, STATUS) is None
    assert hit_rate(EngineStats()) == "–"
    early, late = EngineStats(first_tokens=2, first_token_s=1.0), EngineStats(first_tokens=4, first_token_s=1.5)
    assert ttft(EngineStats(), None) is None
    assert (ttft(early, None), ttft(late, early), ttft(late, late)) == (0.5, 0.25, 0.375)
    assert [span(s) for s in (0.4, 89, 600, 7380, 200000)] == ["0 s", "89 s", "10 min", "2 h 03", "2 d"]


def test_json_for_machines():
    told = json.loads(to_json(whole()))
    assert told["is_well"] is True
    assert told["totals"]["generation_tokens"] == 5000
    assert told["replicas"][0]["status"]["ranks"][3]["node"] == "n2"

"""A host cut off from the network: nothing closes a connection, and yet its streams go on elsewhere."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hosts import ENVIRONMENT, Hosts, allowed

SCENARIO = Path(__file__).with_name("scenario_cut_off.py")
pytestmark = [pytest.mark.live, pytest.mark.skipif(not allowed(), reason="needs root and network namespaces (Linux)")]


@pytest.fixture
def hosts():
    with Hosts(3) as three:
        yield three


def scenario(hosts, deployment):
    """The scenario's process on the head, its workers started as soon as the ingress is there."""
    hosts.start_head()
    process = hosts.popen(
        0,
        [sys.executable, str(SCENARIO), hosts.addresses[0], json.dumps(deployment)],
        ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    line = process.stdout.readline()
    assert line == "ingress\n", line
    hosts.start_workers()
    line = process.stdout.readline()
    assert line == "streaming\n", line
    return process


@pytest.mark.timeout(180)
def test_streams_of_a_host_that_is_cut_off_go_on_elsewhere(hosts):
    deployment = {"model": "fake:step_ms=10", "served_model_name": "fake", "num_replicas": 2}
    process = scenario(hosts, deployment | {"routing": {"policy": "round_robin"}})
    hosts.cut(1)
    out, _ = process.communicate(timeout=120)
    result = json.loads(out.splitlines()[-1])
    assert all(result["equal"]), result
    assert set(result["ends"]) == {"length"}
    # Some of the streams were on that host. An ingress notices after a ping and its time limit, Ray after three looks:
    # a stream that has to wait for that as well has waited for both.
    assert 0.5 < max(result["pauses"]) < 6.0, result

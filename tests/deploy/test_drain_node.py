"""The script that empties a node, on a cluster of two: what runs there may end, what comes next goes elsewhere."""

import asyncio
import subprocess
import sys

import pytest
import ray
from deployfiles import DEPLOY
from ray import serve
from ray.cluster_utils import Cluster

pytestmark = pytest.mark.live

CALL_S = 3.0


@serve.deployment(ray_actor_options={"num_cpus": 1}, graceful_shutdown_timeout_s=30, graceful_shutdown_wait_loop_s=0.1)
class Sleeper:
    async def __call__(self, seconds: float) -> str:
        """The node this runs on, after so long."""
        await asyncio.sleep(seconds)
        return ray.get_runtime_context().get_node_id()


@pytest.fixture
def cluster():
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    yield cluster
    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()


def test_a_node_is_emptied(cluster):
    serve.start(proxy_location="Disabled")
    handle = serve.run(Sleeper.bind(), name="sleeper", route_prefix=None)
    node = handle.remote(0).result()
    running = handle.remote(CALL_S)
    script = DEPLOY / "ray" / "drain_node.py"
    command = [sys.executable, script, "--address", cluster.address, "--node-id", node, "--deadline", "60"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, f"node {node}: 0 replicas left\n"), ended.stderr
    assert running.result(timeout_s=1) == node
    assert handle.remote(0).result() != node

#!/usr/bin/env python3
"""Empty a Ray node before it goes: no new replica comes, those it has move away, then this ends. Run it on the node.

Serve starts a replacement for each replica first and only then stops the old one, which may go on with its requests
for its drain timeout; where there is no room for a replacement, the old one stops in time before the deadline. The exit
code is 0 when nothing of Serve is left here, 1 when the deadline came first. Knows Ray and the names of Serve's actors.
"""

from __future__ import annotations

import argparse
import time

import ray
from ray._private.state import actors
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

POLL_S = 1.0
# Of all that runs on a node, what carries requests. A proxy goes by itself once no replica is left beside it.
REPLICA_PREFIX = "SERVE_REPLICA::"


def drain(node_id: str, deadline_s: float, message: str) -> None:
    """Ask the head to place nothing on the node and to tell Serve. Raises RuntimeError if it refuses."""
    gcs = GcsClient(address=ray.get_runtime_context().gcs_address)
    deadline_ms = int((time.time() + deadline_s) * 1000)
    accepted, why_not = gcs.drain_node(node_id, DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, message, deadline_ms)
    if not accepted:
        raise RuntimeError(f"The head does not accept the drain of node {node_id}: {why_not}")


def replicas_on(node_id: str) -> list[str]:
    """Names of Serve's replicas that are alive on the node."""
    alive = actors(actor_state_name="ALIVE").values()
    names = (actor["Name"] for actor in alive if actor["Address"]["NodeID"] == node_id)
    return sorted(name for name in names if name.startswith(REPLICA_PREFIX))


def wait_until_empty(node_id: str, deadline_s: float) -> list[str]:
    """What is still there when nothing is left, or at the deadline."""
    end = time.monotonic() + deadline_s
    while (left := replicas_on(node_id)) and time.monotonic() < end:
        time.sleep(POLL_S)
    return left


def main() -> int:
    parser = argparse.ArgumentParser(description="Empty a Ray node before it goes.")
    parser.add_argument("--deadline", type=float, default=660.0, help="seconds after which the node is gone (660)")
    parser.add_argument("--node-id", help="hexadecimal id of another node than this one")
    parser.add_argument("--message", default="The node is about to go.")
    parser.add_argument("--address", default="auto", help="of the Ray cluster (auto)")
    given = parser.parse_args()
    ray.init(address=given.address, logging_level="ERROR", log_to_driver=False)
    node_id = given.node_id or ray.get_runtime_context().get_node_id()
    drain(node_id, given.deadline, given.message)
    left = wait_until_empty(node_id, given.deadline)
    print(f"node {node_id}: {len(left)} replicas left {' '.join(left)}".rstrip())
    return 1 if left else 0


if __name__ == "__main__":
    raise SystemExit(main())

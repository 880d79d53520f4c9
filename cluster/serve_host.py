"""What a replica's process is to Serve: told to stop, or ending itself.

Serve tells user code of neither: it waits, once it drains a replica, until no request is left, and kills it when its
patience ends. So the flag is read where Serve keeps it; without it (another version, say) a drained replica is killed
with its last requests, which then go on elsewhere all the same, some tokens poorer until they are computed again.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray import serve

from octavo.cluster.failures import Failure, record

logger = logging.getLogger(__name__)

# How long a failed replica may take to tell the world before its process ends.
LAST_WORDS_S = 1.0


def drain_flag() -> Callable[[], bool]:
    """A function that says whether Serve drains the replica whose process this is."""
    worker = ray._private.worker.global_worker
    actor = worker.actors.get(worker.actor_id)
    replica: Any = getattr(actor, "_replica_impl", None)
    if not hasattr(replica, "_shutting_down"):
        logger.warning("this version of Ray Serve does not show that it drains a replica: nothing is handed over")
        return lambda: False
    return lambda: bool(replica._shutting_down)


def came_through_handle() -> bool:
    """Whether the call at hand came by one of Serve's proxies, as a task for this actor, and not on a connection that
    this process holds itself (direct ingress, as behind HAProxy). Serve does not say; the name of Ray's task does: what
    listens here was started by the replica's first one.
    """
    return not (ray.get_runtime_context().get_task_name() or "").endswith(".initialize_and_get_metadata")


def end_process(error: BaseException) -> None:
    """Record why, and end the process: Serve replaces a dead replica at its next look, a sick one after three."""
    replica = serve.get_replica_context().replica_id.unique_id
    node: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    failure = Failure(time.time(), replica, node, str(error))
    logger.critical("the replica ends: %s", failure)
    telling = threading.Thread(target=record, args=(failure,), daemon=True)
    telling.start()
    telling.join(LAST_WORDS_S)
    for handler in logging.getLogger().handlers:
        handler.flush()
    os._exit(1)


def note_broken(replica: str, host: str) -> None:
    """Record at an ingress that a replica's channel broke; returns at once."""
    failure = Failure(time.time(), replica, host, "its process died or hung, or was cut off from an ingress.")
    logger.warning("lost: %s", failure)
    threading.Thread(target=record, args=(failure,), name="record-failure", daemon=True).start()

"""Failures: what ended replicas, kept in the cluster's control store (Ray's GCS), where it outlives them.

The first word about a replica counts: its own, as a rule, said before it goes; else that of an ingress whose channel to
it broke. `octavo status` shows them.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from dataclasses import dataclass

from ray.experimental import internal_kv as kv

logger = logging.getLogger(__name__)

KEEP = 64
NAMESPACE = b"octavo"
PREFIX = b"failure/"


@dataclass(frozen=True, slots=True)
class Failure:
    """One replica's end. `at`: Unix seconds. `node`: its address. `why`: a sentence, which names the first rank that
    failed where there are several.
    """

    at: float
    replica: str
    node: str
    why: str

    def __str__(self) -> str:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.at))
        return f"{when}  replica {self.replica} on {self.node}: {self.why}"


def record(failure: Failure) -> bool:
    """Keep `failure` unless one of its replica is kept; blocks for a round trip to the GCS. False: it could not be."""
    try:
        keys = sorted(kv._internal_kv_list(PREFIX, namespace=NAMESPACE))
        if any(key.endswith(b"/" + failure.replica.encode()) for key in keys):
            return True
        key = PREFIX + f"{failure.at:017.6f}/{failure.replica}".encode()  # so that keys sort by time
        kv._internal_kv_put(key, json.dumps(dataclasses.asdict(failure)), namespace=NAMESPACE)
        for old in keys[: max(0, len(keys) + 1 - KEEP)]:
            kv._internal_kv_del(old, namespace=NAMESPACE)
    except Exception as error:
        logger.warning("the failure could not be recorded (%r): %s", error, failure)
        return False
    return True


def recent(count: int = KEEP) -> list[Failure]:
    """The newest failures, newest first. Raises what Ray raises when its control store cannot be reached."""
    keys = sorted(kv._internal_kv_list(PREFIX, namespace=NAMESPACE), reverse=True)[:count]
    values = (kv._internal_kv_get(key, namespace=NAMESPACE) for key in keys)
    return [Failure(**json.loads(value)) for value in values if value is not None]

"""OctavoRequestRouter: Serve's router of an engine pool. Glue: the decision is the Fleet's, which came with the call.

Serve makes the router itself, in each process that has a handle, from the class's import path: nothing can be given to
it. But a call's arguments reach it as the caller's own objects. So each control call has an argument that only the
router reads (`Call`), and which is sent to the replica as None.

Serve sends this module's contents by value: what is defined here exists twice in a process that imports it, too. So
nothing that others use may be defined here.
"""

from __future__ import annotations

import random
import time
from typing import Any

from ray.serve._private.replica_result import ReplicaResult
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from octavo.cluster.routing.call import Call, Watcher

# How many ranks Serve is offered one by one before all others together.
RANKS = 4
# How long a replica that could not be reached is asked for a sign of life before it is sent anything.
DOUBT_S = 5.0


class OctavoRequestRouter(RequestRouter):
    """Sends a request where its Call says. Calls without one go to any replica, local ones first.

    Serve would ask a replica for its queue's length before sending to it, if it has not heard of it for 10 s. The
    engine queues for itself and refuses what is too much, so the length is taken to be known, unless the replica was
    lately unreachable.
    """

    def __init__(self, *args: Any, self_node_id: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._node_id = self_node_id
        self._by_id: dict[str, RunningReplica] = {}
        self._unreachable: dict[ReplicaID, float] = {}  # replica → until when it is in doubt
        self._watchers: list[Watcher] = []

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._announce()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._announce()

    def on_replica_actor_unavailable(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_unavailable(replica_id)
        self._unreachable[replica_id] = time.monotonic() + DOUBT_S

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        call = _call_of(pending_request)
        if call is not None and call.watcher is not None and call.watcher not in self._watchers:
            self._watchers.append(call.watcher)
            call.watcher.replicas_changed(self._local())
        ranked = self._ranked(call)
        now = time.monotonic()
        for replica in ranked[:RANKS]:
            known = self.replica_queue_len_cache.get(replica.replica_id)
            # Serve routes few calls at once. One that means this replica alone would hold a place in vain until the
            # replica answers; it may as well fail.
            meant = call is not None and call.only is not None
            if known is None and (meant or self._unreachable.get(replica.replica_id, 0.0) < now):
                self.replica_queue_len_cache.update(replica.replica_id, 0)
        return [*([replica] for replica in ranked[:RANKS]), ranked[RANKS:]]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        call = _call_of(pending_request)
        if call is not None and call.fleet is not None and call.placing is not None:
            call.fleet.moved(call.placing, replica_id.unique_id)

    def _ranked(self, call: Call | None) -> list[RunningReplica]:
        if call is not None and call.only is not None and call.only in self._by_id:
            return [self._by_id[call.only]]
        if call is not None and call.fleet is not None and call.placing is not None:
            ranked = call.fleet.place(call.placing)
            found = [self._by_id[replica] for replica in ranked if replica in self._by_id]
            if found:
                return found
        others = list(self._by_id.values())
        random.shuffle(others)
        return sorted(others, key=lambda replica: replica.node_id != self._node_id)

    def _announce(self) -> None:
        self._by_id = {replica_id.unique_id: replica for replica_id, replica in self.curr_replicas.items()}
        now = time.monotonic()
        self._unreachable = {replica: until for replica, until in self._unreachable.items() if until > now}
        local = self._local()
        for watcher in self._watchers:
            watcher.replicas_changed(local)

    def _local(self) -> dict[str, bool]:
        return {name: replica.node_id == self._node_id for name, replica in self._by_id.items()}


def _call_of(pending_request: PendingRequest | None) -> Call | None:
    if pending_request is None:
        return None
    return next((argument for argument in pending_request.args if isinstance(argument, Call)), None)

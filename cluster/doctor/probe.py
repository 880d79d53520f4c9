"""Probe: the actor that looks at one node from inside, for as long as `octavo doctor` runs."""

from __future__ import annotations

from collections.abc import Sequence

import ray

from octavo.cluster.doctor import collective, links
from octavo.cluster.doctor.facts import Link, NodeFacts
from octavo.cluster.doctor.here import Wanted, gather


@ray.remote(num_cpus=0, max_restarts=0)
class DoctorProbe:
    """One per node. Its methods run one after the other."""

    def __init__(self) -> None:
        self._echo = links.Echo()

    def look(self, wanted: Wanted) -> tuple[NodeFacts, int]:
        """(the node's facts, the port where its echo listens)."""
        return gather(wanted), self._echo.port

    def reach(self, source: str, peers: Sequence[links.Peer], timeout_s: float) -> tuple[Link, ...]:
        return links.measure(source, peers, timeout_s)

    def host(self, address: str, timeout_s: float) -> int:
        """Let ranks meet at this port of `address`, which is this node's, for as long as the probe lives."""
        from octavo.engine.parallel.connect import HostedRendezvous

        self._hosted = HostedRendezvous(address, timeout_s, step_timeout_s=timeout_s)
        return self._hosted.rendezvous.port

    def all_reduce(self, seats: collective.Seats) -> tuple[float, str | None]:
        return collective.time_all_reduce(seats)

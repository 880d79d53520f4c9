"""Fleet: what one ingress knows of the replicas of one model, and its decision which of them gets a request.

Knows replica ids, their load, their blocks (BlockIndex) and a policy. Does not know Ray, transport or time beyond the
`now` it is given. Thread-safe: decisions are made on Serve's router thread, news come in on the ingress's event loop.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from octavo.cluster.observability.routing import RoutingMetrics
from octavo.cluster.routing.index import BlockIndex
from octavo.cluster.routing.pace import Pace
from octavo.cluster.routing.policies import Load, Policy, keep_session
from octavo.engine.core.blocks import BlockChanges
from octavo.engine.core.prefix import Chain
from octavo.engine.types import EngineStats

# What a sequence that runs, or waits for others to end, costs a newcomer beside its own prompt: in tokens.
RUNNING_TOKENS = 16.0
QUEUED_TOKENS = 128.0
# Above this part of the KV pool in use a token costs more, up to 1 + MAX_PRESSURE times as much when it is full.
PLENTY_OF_KV = 0.8
MAX_PRESSURE = 2.0
# Looked-up tokens over which a replica's hit rate is averaged.
HIT_RATE_TOKENS = 16384
# Of a request that is on its way, so many leading blocks count as held where it was placed: a burst of requests with
# one new beginning then computes it once.
MAX_COMING = 256
# Prompts that are remembered from one tidying to the next.
MAX_USED = 1024
# A replica not heard of for so long comes after all others.
STALE_S = 5.0


@dataclass(eq=False, slots=True)
class Placing:
    """A request on its way to a replica. `avoid`: replicas that it has just been lost with."""

    num_tokens: int
    chain: Chain
    session: str | None = None
    avoid: frozenset[str] = frozenset()
    replica: str | None = None  # where it was placed; None before and once its first token is there
    predicted: int = 0  # tokens it should find cached there
    num_coming: int = 0  # leading blocks that count as held there, for its sake
    tried: set[str] = field(default_factory=set)


@dataclass(eq=False, slots=True)
class _Member:
    load: Load
    stats: EngineStats = field(default_factory=EngineStats)
    heard_at: float | None = None
    pace: Pace = field(default_factory=Pace)
    is_lost: bool = False
    hit_rate: float = 0.0  # of its prefix cache, lately
    # Of what this ingress has placed there and has no first token of: requests, prompt tokens, tokens to be computed.
    own_requests: int = 0
    own_tokens: int = 0
    own_cost: int = 0


class Fleet:
    """The replicas of one model, as seen from one ingress."""

    def __init__(self, policy: Policy, max_index_blocks: int, metrics: RoutingMetrics | None = None) -> None:
        self.index = BlockIndex(max_index_blocks)
        self._coming = BlockIndex(max_index_blocks)  # blocks that requests on their way will have computed
        self.metrics = metrics or RoutingMetrics()
        self._used: deque[tuple[Chain, int]] = deque(maxlen=MAX_USED)
        self._policy = policy
        self._members: dict[str, _Member] = {}
        self._usable: list[Load] = []  # of members that are heard of
        self._doubtful: list[Load] = []
        self._lock = threading.Lock()

    @property
    def replicas(self) -> tuple[str, ...]:
        return tuple(self._members)

    # ── news ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def set_replicas(self, replicas: Mapping[str, bool]) -> None:
        """The replicas there are, and whether each is on this ingress's node. Who is not there is forgotten at once."""
        with self._lock:
            for gone in self._members.keys() - replicas.keys():
                del self._members[gone]
                self.index.drop(gone)
                self._coming.drop(gone)
            for replica, is_local in replicas.items():
                member = self._members.setdefault(replica, _Member(Load(replica)))
                member.load.is_local = is_local
            self._sort_out()

    def observe(self, replica: str, stats: EngineStats, now: float) -> None:
        """`stats` of a replica as they were at `now`, seconds on this process's monotonic clock."""
        with self._lock:
            member = self._members.get(replica)
            if member is None:
                return
            looked_up = stats.prefix_queries - member.stats.prefix_queries
            if looked_up > 0:
                rate = (stats.prefix_hits - member.stats.prefix_hits) / looked_up
                member.hit_rate += min(1.0, looked_up / HIT_RATE_TOKENS) * (rate - member.hit_rate)
            member.stats, member.heard_at = stats, now
            member.pace.observe(stats, now)
            if member.is_lost:
                member.is_lost = False
                self._sort_out()
            _weigh(member)

    def change(self, replica: str, changes: BlockChanges) -> None:
        """What became of a replica's blocks."""
        with self._lock:
            if replica not in self._members:
                return
            if changes.cleared:
                self.index.drop(replica)
            self.index.evict(replica, changes.evicted)
            self.index.store(replica, changes.stored)

    def lose(self, replica: str) -> None:
        """Nothing can be heard of the replica: its blocks are unknown, and others go first until it is heard again."""
        with self._lock:
            self.index.drop(replica)
            member = self._members.get(replica)
            if member is not None:
                member.is_lost = True
                self._sort_out()

    def is_lost(self, replica: str) -> bool:
        """Whether the replica is there and nothing is heard of it."""
        member = self._members.get(replica)
        return member is not None and member.is_lost

    def check_ages(self, now: float) -> None:
        """Put those behind that have been silent for long. To be called about once a second."""
        with self._lock:
            for member in self._members.values():
                if member.heard_at is not None and now - member.heard_at > STALE_S:
                    member.is_lost = True
            self._sort_out()

    def tidy(self) -> Iterator[None]:
        """Keep the index in order: what was used is forgotten last, what was left is removed. To be called about once a
        second; each step takes about a millisecond, and decisions may be made between them.
        """
        steps = itertools.chain(self._touch_used(), self.index.sweep(), self._coming.sweep())
        while True:
            with self._lock:
                if next(steps, self) is self:
                    return
            yield

    # ── decisions ─────────────────────────────────────────────────────────────────────────────────────────────────

    def place(self, placing: Placing) -> list[str]:
        """Replicas for a request, best first; it counts as placed with the first until its `started` or `ended`.

        Called again, the request has found no place there: the others come first.
        """
        begin = time.perf_counter()
        with self._lock:
            if placing.replica is not None:
                placing.tried.add(placing.replica)
                self._unplace(placing)
            chain = placing.chain
            hits = self._hits(chain) if self._policy.wants_hits else {}
            ranked = self._policy.choose(self._usable, placing.num_tokens, hits)
            if placing.session is not None:
                ranked = keep_session(ranked, placing.session)
            ranked = ranked + self._doubtful
            behind = placing.avoid | placing.tried
            if behind:
                ranked.sort(key=lambda load: load.replica in behind)
            if ranked:
                self._place_with(placing, ranked[0].replica, hits)
        self.metrics.decided(time.perf_counter() - begin)
        if self._policy.wants_hits:
            with self._lock:
                self._expect(placing)
        return [load.replica for load in ranked]

    def expected_wait_s(self) -> float:
        """How long a request that comes now would wait for its turn, where that is the shortest; 0 if nobody knows."""
        with self._lock:
            heard = (member for member in self._members.values() if not member.is_lost)
            return min((member.pace.wait_s(_waiting_tokens(member)) for member in heard), default=0.0)

    def moved(self, placing: Placing, replica: str) -> None:
        """Serve has sent the request to another replica than the best."""
        with self._lock:
            if placing.replica is not None and placing.replica != replica:
                self._unplace(placing)
                self._place_with(placing, replica, {})

    def started(self, placing: Placing, cached_tokens: int) -> None:
        """The first token is there; `cached_tokens` of the prompt were found in the cache."""
        with self._lock:
            if placing.replica is not None and self._policy.wants_hits:
                self.metrics.found(placing.predicted, cached_tokens)
            self._unplace(placing)

    def ended(self, placing: Placing) -> None:
        """The request is over, however it ended. Harmless after `started`."""
        with self._lock:
            self._unplace(placing)

    def _hits(self, chain: Chain) -> dict[str, int]:
        """Tokens of the prompt that each replica has cached, or will have when a new request's turn comes."""
        counts = self.index.match(chain)
        if len(self._coming):
            for replica, count in self._coming.match(chain).items():
                if count > counts.get(replica, 0):
                    counts[replica] = count
        return {replica: count * chain.block_size for replica, count in counts.items()}

    def _touch_used(self) -> Iterator[None]:
        while self._used:
            self.index.touch(*self._used.popleft())
            yield

    def _expect(self, placing: Placing) -> None:
        """After the decision: remember what the request uses, and what it will bring."""
        chain = placing.chain
        num_held = placing.predicted // chain.block_size
        if num_held:
            self._used.append((chain, num_held))
        if placing.replica is not None and num_held < MAX_COMING:
            placing.num_coming = min(len(chain), MAX_COMING)
            self._coming.store(placing.replica, chain.names(placing.num_coming)[: placing.num_coming])

    def _place_with(self, placing: Placing, replica: str, hits: Mapping[str, int]) -> None:
        placing.replica, placing.predicted = replica, hits.get(replica, 0)
        member = self._members.get(replica)
        if member is not None:
            self._count(member, placing, +1)

    def _unplace(self, placing: Placing) -> None:
        if placing.replica is None:
            return
        member = self._members.get(placing.replica)
        self._coming.evict(placing.replica, placing.chain.names(placing.num_coming)[: placing.num_coming])
        placing.replica, placing.num_coming = None, 0
        if member is not None and member.own_requests:
            self._count(member, placing, -1)

    def _count(self, member: _Member, placing: Placing, sign: int) -> None:
        member.own_requests += sign
        member.own_tokens += sign * placing.num_tokens
        member.own_cost += sign * (placing.num_tokens - placing.predicted)
        _weigh(member)

    def _sort_out(self) -> None:
        self._usable = [member.load for member in self._members.values() if not member.is_lost]
        self._doubtful = [member.load for member in self._members.values() if member.is_lost]


def _waiting_tokens(member: _Member) -> float:
    """Prompt tokens before a newcomer: what waits there, or what this ingress knows to be on its way."""
    return max(member.stats.waiting_tokens, member.own_tokens - member.stats.prefill_tokens)


def _weigh(member: _Member) -> None:
    """From what is known of a replica to its Load.

    Its own queue counts whole prompts, also what it will find cached. What this ingress has placed there is known
    better: only the rest of the queue, which others sent, is estimated, from the replica's hit rate.
    """
    stats, load = member.stats, member.load
    of_others = max(0, stats.waiting_tokens + stats.prefill_tokens - member.own_tokens) * (1.0 - member.hit_rate)
    running = RUNNING_TOKENS * (stats.num_running + member.own_requests)
    load.waiting = member.own_cost + of_others + running + QUEUED_TOKENS * stats.num_waiting
    load.pressure = MAX_PRESSURE * max(0.0, stats.kv_usage - PLENTY_OF_KV) / (1.0 - PLENTY_OF_KV)

"""Policies: which replica a request is best sent to. Pure: no Ray, no torch, no clock, no transport.

A policy ranks replicas by what the fleet knows of them. Costs are in tokens: the prompt tokens that would have to be
computed there before this request's first token, its own and those that wait before it.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Protocol

from octavo.engine.errors import ConfigError

# Costs that differ by less count as equal: then the node decides, then chance.
EQUAL_TOKENS = 32.0
# What has to be computed counts this much more than what waits: it takes time from those who come later, too.
COMPUTE_WEIGHT = 1.5
# A session leaves its replica for another one when the load there exceeds FACTOR × the least load + SLACK tokens.
SESSION_FACTOR = 2.0
SESSION_SLACK_TOKENS = 4096.0
_MASK = (1 << 64) - 1


@dataclass(eq=False, slots=True)
class Load:
    """A replica, as a policy sees it.

    waiting: tokens that will be computed there before a new request's. pressure: part by which computing a token costs
    more there, because KV is scarce and something will have to be evicted or preempted; 0 = KV is plentiful.
    is_local: on this ingress's node.
    """

    replica: str
    is_local: bool = False
    waiting: float = 0.0
    pressure: float = 0.0
    seed: int = field(init=False)

    def __post_init__(self) -> None:
        self.seed = int.from_bytes(blake2b(self.replica.encode(), digest_size=8).digest())


class Policy(Protocol):
    """`wants_hits`: whether `choose` is to be told of prefix hits, or may be spared looking them up."""

    wants_hits: bool

    def choose(self, loads: Sequence[Load], num_tokens: int, hits: Mapping[str, int]) -> list[Load]:
        """All of `loads`, best first, for a prompt of `num_tokens`; `hits`: tokens of it that replicas have cached."""
        ...


class Prefix:
    """Where the least is left to compute: the prompt without what is cached there, and what waits there."""

    wants_hits = True

    def choose(self, loads: Sequence[Load], num_tokens: int, hits: Mapping[str, int]) -> list[Load]:
        if not hits:
            return _ranked(loads, [load.waiting + num_tokens * load.pressure for load in loads])
        get = hits.get
        costs = [
            load.waiting + (num_tokens - get(load.replica, 0)) * (COMPUTE_WEIGHT + load.pressure) for load in loads
        ]
        return _ranked(loads, costs)


class LeastLoaded:
    """Where the least waits."""

    wants_hits = False

    def choose(self, loads: Sequence[Load], num_tokens: int, hits: Mapping[str, int]) -> list[Load]:
        return _ranked(loads, [load.waiting + num_tokens * load.pressure for load in loads])


class RoundRobin:
    """Each in turn."""

    wants_hits = False

    def __init__(self) -> None:
        self._next = 0

    def choose(self, loads: Sequence[Load], num_tokens: int, hits: Mapping[str, int]) -> list[Load]:
        ordered = sorted(loads, key=lambda load: load.replica)
        start = self._next % len(ordered) if ordered else 0
        self._next = start + 1
        return ordered[start:] + ordered[:start]


POLICIES: Mapping[str, type[Policy]] = {"prefix": Prefix, "least_loaded": LeastLoaded, "round_robin": RoundRobin}


def make_policy(name: str) -> Policy:
    """A policy of POLICIES, or `package.module:Class` of one's own, made without arguments. Raises ConfigError."""
    if name in POLICIES:
        return POLICIES[name]()
    module, _, attribute = name.partition(":")
    try:
        policy = getattr(importlib.import_module(module), attribute)()
    except Exception as error:
        raise ConfigError(f"routing.policy {name!r} cannot be used: {type(error).__name__}: {error}.") from error
    if not callable(getattr(policy, "choose", None)) or not isinstance(getattr(policy, "wants_hits", None), bool):
        raise ConfigError(f"routing.policy {name!r} has no method choose, or no attribute wants_hits of True or False.")
    made: Policy = policy
    return made


def keep_session(ranked: list[Load], session: str) -> list[Load]:
    """`ranked` with the session's own replica in front, unless it is much more loaded than the best one.

    Rendezvous hashing (Thaler and Ravishankar 1998): of the replicas there are, the one with the highest hash of
    (session, replica); when a replica comes or goes, only the sessions move that are its own.
    """
    if not ranked:
        return ranked
    session_seed = int.from_bytes(blake2b(session.encode(), digest_size=8).digest())
    own = max(ranked, key=lambda load: _mixed(session_seed ^ load.seed))
    if own.waiting > SESSION_FACTOR * min(load.waiting for load in ranked) + SESSION_SLACK_TOKENS:
        return ranked
    return [own, *(load for load in ranked if load is not own)]


def _mixed(value: int) -> int:
    """SplitMix64's finaliser (Steele et al. 2014): every bit of the result depends on every bit of `value`."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31


def _ranked(loads: Sequence[Load], costs: list[float]) -> list[Load]:
    """By cost. Of those that equal the best one, local ones first, then by chance, lest all ingresses herd to one."""
    if not loads:
        return []
    order = sorted(range(len(costs)), key=costs.__getitem__)
    enough = costs[order[0]] + EQUAL_TOKENS
    equal = next((place for place, index in enumerate(order) if costs[index] > enough), len(order))
    if equal > 1:
        start = random.randrange(equal)
        best = order[start:equal] + order[:start]
        order[:equal] = sorted(best, key=lambda index: not loads[index].is_local)
    return [loads[index] for index in order]

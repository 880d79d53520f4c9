"""Who goes first: a policy gives each sequence a fixed key; smaller keys are admitted first and preempted last.

Keys never change after arrival, so queues can stay sorted, and "nothing starves" follows from the keys alone: only
finitely many sequences can ever have a smaller key than a given one.
"""

from __future__ import annotations

from collections.abc import Callable

from octavo.engine.errors import ConfigError

Key = tuple[int, int]

# One level of priority is worth this many steps of waiting. A request of priority p + k is overtaken by requests of
# priority p that arrive up to k * AGING_STEPS steps after it, and by no later ones.
AGING_STEPS = 512


def fcfs(priority: int, step: int, order: int) -> Key:
    """First come, first served."""
    return (0, order)


def by_priority(priority: int, step: int, order: int) -> Key:
    """Lower priority value first, aged: a waiting sequence gains one level per AGING_STEPS steps."""
    return (priority * AGING_STEPS + step, order)


POLICIES: dict[str, Callable[[int, int, int], Key]] = {"fcfs": fcfs, "priority": by_priority}


def policy(name: str) -> Callable[[int, int, int], Key]:
    """The key function (priority, step of arrival, order of arrival) → key."""
    if name not in POLICIES:
        raise ConfigError(f"scheduling_policy must be one of {', '.join(POLICIES)}, got {name!r}.")
    return POLICIES[name]

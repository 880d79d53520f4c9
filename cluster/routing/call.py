"""Call: what a control call tells the router in its own process. Apart from router.py, of which Serve makes a copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from octavo.cluster.routing.fleet import Fleet, Placing


class Watcher(Protocol):
    """Who wants to know which replicas there are. Called on the router's thread."""

    def replicas_changed(self, replicas: Mapping[str, bool]) -> None: ...


class Call:
    """What a control call tells the router in its own process. Pickled it is None.

    fleet: decides on `placing`, the request to be placed, if the call is one. only: the replica that is meant. watcher:
    is told of the replicas there are, from now on.
    """

    __slots__ = ("fleet", "only", "placing", "watcher")

    def __init__(
        self,
        fleet: Fleet | None = None,
        placing: Placing | None = None,
        only: str | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        self.fleet = fleet
        self.placing = placing
        self.only = only
        self.watcher = watcher

    def __reduce__(self) -> Any:
        return (type(None), ())

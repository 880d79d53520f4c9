"""What the driver of a replica and its ranks say to one another: typed messages, and their bytes (msgpack).

Knows the fields, not sockets. A rank's life is Hello, (Hosting), Phase …, Built, Ready, then one Done per step from the
rank that draws the tokens, and Beats all the time; or Failed, once.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from octavo.engine.core.plan import StepPlan, StepResult, TokenMasks
from octavo.engine.types import EngineInfo


class _Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Encoded as [name of the class, field, …]."""


class Host(_Message, frozen=True, array_like=True, tag=True):
    """To rank 0: make a place where the ranks' collectives find one another, and say where it is."""


class Begin(_Message, frozen=True, array_like=True, tag=True):
    """To all: build the model. rendezvous: (host, port), None with one rank. ranks_on_node: that share its memory."""

    rendezvous: tuple[str, int] | None
    ranks_on_node: int


class Allocate(_Message, frozen=True, array_like=True, tag=True):
    """To all: the KV pool has so many blocks, the longest sequence so many tokens."""

    num_blocks: int
    max_model_len: int


class Step(_Message, frozen=True, array_like=True, tag=True):
    """To all: execute a plan."""

    plan: StepPlan


class Masks(_Message, frozen=True, array_like=True, tag=True):
    """To the ranks of the last stage: what a step they have, or will have next, may draw."""

    masks: TokenMasks


class Stop(_Message, frozen=True, array_like=True, tag=True):
    """To all: the replica ends."""


class Hello(_Message, frozen=True, array_like=True, tag=True):
    """The first message on a connection. node: where the rank runs, as Ray calls it. Nothing is believed without the
    token."""

    token: str
    rank: int
    pid: int
    node: str
    gpu: int | None = None


class Hosting(_Message, frozen=True, array_like=True, tag=True):
    """Rank 0's answer to Host."""

    host: str
    port: int


class Phase(_Message, frozen=True, array_like=True, tag=True):
    """A phase of the start-up ended."""

    name: str
    seconds: float


class Built(_Message, frozen=True, array_like=True, tag=True):
    """The weights are loaded; info.num_blocks KV blocks would fit here."""

    info: EngineInfo


class Ready(_Message, frozen=True, array_like=True, tag=True):
    """The KV pool is allocated: steps may come."""


class Beat(_Message, frozen=True, array_like=True, tag=True):
    """Sign of life, independent of the step. steps: finished so far. busy_s: how long the present one has taken, 0 if
    none. waits: it stands in a collective, so that another rank is to blame."""

    steps: int
    busy_s: float
    waits: bool


class Done(_Message, frozen=True, array_like=True, tag=True):
    """What a step brought."""

    result: StepResult


class Failed(_Message, frozen=True, array_like=True, tag=True):
    """The rank cannot go on. config: the configuration is at fault. lost: only because another rank went."""

    kind: Literal["config", "lost", "error"]
    message: str


ToRank = Host | Begin | Allocate | Step | Masks | Stop
ToDriver = Hello | Hosting | Phase | Built | Ready | Beat | Done | Failed

to_rank = msgspec.msgpack.Decoder(ToRank)
to_driver = msgspec.msgpack.Decoder(ToDriver)
encode = msgspec.msgpack.Encoder().encode

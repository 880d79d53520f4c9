"""What `octavo doctor` learns of a cluster, as plain frozen values. Gathering fills them, judging reads them.

No Ray here, no torch, no opinion on what is right.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Interface:
    """A network interface and one of its addresses."""

    name: str
    address: str


@dataclass(frozen=True, slots=True)
class Gpu:
    """As nvidia-smi tells it. Sizes in bytes."""

    index: int
    name: str
    driver: str
    memory: int
    free: int


@dataclass(frozen=True, slots=True)
class Disk:
    """A file system that something of ours is written to. `use`: what. Sizes in bytes."""

    use: str
    path: str
    total: int
    free: int


@dataclass(frozen=True, slots=True)
class Port:
    """A port that will be listened on. `free`: whether that would work now."""

    use: str
    number: int
    free: bool


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model's path as one node sees it. digest: of its files' names and sizes. error: why it cannot be read."""

    path: str
    num_files: int = 0
    size: int = 0  # bytes
    digest: str = ""
    error: str | None = None


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What a node says of itself.

    machine: equal for nodes that share a kernel and its network (several raylets on one machine).
    versions: (distribution, version or None). kernels: instruction sets of the native CPU ops that are built and that
    this CPU runs, best first. shm: size of /dev/shm in bytes, None if there is none. nofile: limit of open files.
    """

    hostname: str = ""
    machine: str = ""
    interfaces: tuple[Interface, ...] = ()
    versions: tuple[tuple[str, str | None], ...] = ()
    gpus: tuple[Gpu, ...] = ()
    kernels: tuple[str, ...] = ()
    nofile: int = 0
    shm: int | None = None
    disks: tuple[Disk, ...] = ()
    ports: tuple[Port, ...] = ()
    models: tuple[ModelFiles, ...] = ()


@dataclass(frozen=True, slots=True)
class Node:
    """A node of the cluster. address: as Ray knows it. gpus, cpus: as Ray was told.

    facts: None if it did not answer; `trouble` then says why. lost: why Ray gave the node up, for one that is gone.
    """

    id: str
    name: str
    address: str
    is_head: bool = False
    gpus: float = 0.0
    cpus: float = 0.0
    facts: NodeFacts | None = None
    trouble: str | None = None
    lost: str | None = None


@dataclass(frozen=True, slots=True)
class Link:
    """One TCP connection from node `source` to node `target`, by ids.

    local_address: the source's end. round_trip_s: the shortest of a few. clock_ahead_s: target's clock minus source's,
    right to half a round trip. error: why there is no connection.
    """

    source: str
    target: str
    local_address: str = ""
    round_trip_s: float = 0.0
    clock_ahead_s: float = 0.0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Collective:
    """An all-reduce over ranks on all nodes. errors: (node id, why). skipped: why it was not tried."""

    backend: str
    num_ranks: int = 0
    num_bytes: int = 0
    seconds: float = 0.0  # the slowest rank's best
    errors: tuple[tuple[str, str], ...] = ()
    skipped: str | None = None


@dataclass(frozen=True, slots=True)
class Survey:
    """Everything that was learned.

    serving: Ray Serve runs already, so its ports are taken by itself. shortage: what the configuration needs and the
    cluster lacks, one sentence; None = nothing, or no configuration was given.
    """

    nodes: tuple[Node, ...]
    links: tuple[Link, ...] = ()
    collectives: tuple[Collective, ...] = ()
    serving: bool = False
    has_config: bool = False
    shortage: str | None = None

    def label(self, node_id: str) -> str:
        """What a person calls the node: `host (address)`, with the beginning of its id where that is not enough."""
        (node,) = (node for node in self.nodes if node.id == node_id)
        name = f"{node.name} ({node.address})" if node.name not in ("", node.address) else node.address
        alike = [other for other in self.nodes if (other.name, other.address) == (node.name, node.address)]
        return name if len(alike) == 1 else f"{name} {node_id[:6]}"

    @property
    def present(self) -> tuple[Node, ...]:
        return tuple(node for node in self.nodes if node.lost is None)

    @property
    def answers(self) -> list[tuple[Node, NodeFacts]]:
        return [(node, node.facts) for node in self.nodes if node.facts is not None]

    @property
    def answering(self) -> list[Node]:
        return [node for node, _ in self.answers]

    @property
    def reference(self) -> tuple[Node, NodeFacts]:
        """What the others are compared with: the head, or the first node that answered. One must have."""
        return next((answer for answer in self.answers if answer[0].is_head), self.answers[0])

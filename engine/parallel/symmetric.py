"""Small sums over memory that the GPUs of a group share, large ones and all else over the link below.

A rank writes where the others read: no library between, and no ring to go round. For the kilobytes of a decode step a
collective's time is that of a few signals. Only where all ranks are on one node and each GPU reaches every other over
NVLink: signals are atomic operations on another GPU's memory, which PCIe does not promise.

Whether to use it is decided once, when ranks connect, by all of them together; the reason is logged.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from octavo.engine import env
from octavo.engine.parallel.connect import ProcessGroupLink
from octavo.engine.parallel.mesh import Link
from octavo.engine.parallel.nvlink import NVLinked, nvlink_obstacle
from octavo.kernels.rounded import Rounded, Rounding

if importlib.util.find_spec("triton") is not None:
    from octavo.kernels.triton import allreduce

log = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIB = 1 << 20
TURNS = 4  # of a trial: more than the buffer has halves
PART_BYTES = 128 << 10  # of a program; 64 of them make the 8 MiB of the largest limit below


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes of a tensor up to which a sum takes one exchange, and two; beyond, the link below does it."""

    one_shot: int
    two_shot: int


# By the number of ranks. Origin: where vLLM's custom all-reduce changes from one kernel to the other, for fully
# connected GPUs; not measured with these kernels. Of two ranks, each has to read no more in one exchange than in two.
LIMITS = {
    2: Limits(8 * MIB, 8 * MIB),
    3: Limits(512 << 10, 8 * MIB),
    4: Limits(512 << 10, 8 * MIB),
    **dict.fromkeys((5, 6, 7, 8), Limits(256 << 10, 8 * MIB)),
}


class SymmetricLink:
    """Sums in rank order, in float32, rounded once: a row's bits are those of gloo's on the CPU, whatever the batch, up
    to the limits.

    memory: what `peers` points into, held here: with CUDA, (this rank's buffer, torch's handle, ...). Closing the link
    does not give it back: other ranks may read it at any time, and to free it waits for the device.
    """

    fuses_norm = True

    def __init__(self, below: Link, peers: allreduce.Peers, limits: Limits, memory: object) -> None:
        self.below, self.peers, self.memory = below, peers, memory
        self._limits = limits

    @property
    def recordable(self) -> bool:
        return self.below.recordable

    @property
    def one_shot_bytes(self) -> int:
        """The largest tensor that takes one exchange."""
        return self._limits.one_shot

    @property
    def most_bytes(self) -> int:
        """The largest tensor that is added up so at all."""
        return self._limits.two_shot

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype in DTYPES and x.nbytes <= self._limits.two_shot and allreduce.fits(x, self.peers):
            body = allreduce.one_shot if x.nbytes <= self._limits.one_shot else allreduce.two_shot
            return body(x.contiguous(), self.peers)
        return self.below.all_reduce(x)

    def sum_add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, rounding: Rounding | None
    ) -> tuple[torch.Tensor | Rounded, torch.Tensor] | None:
        if x.dtype not in DTYPES or x.nbytes > self._limits.one_shot or not allreduce.rows_fit(x, self.peers):
            return None
        return allreduce.sum_add_rms_norm(x.contiguous(), residual, weight, eps, self.peers, rounding)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return self.below.all_gather(x)

    def send(self, x: torch.Tensor, to: int) -> None:
        self.below.send(x, to)

    def recv(self, out: torch.Tensor, source: int) -> None:
        self.below.recv(out, source)

    def close(self) -> None:
        self.below.close()


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank is. node: the same in all processes that can hand one another memory. gpu: UUID. cannot: why it
    can share no memory with anybody; "" = it can."""

    node: str
    gpu: str
    cannot: str = ""


def share_memory(link: ProcessGroupLink, store: dist.Store, device: torch.device) -> Link:
    """A SymmetricLink over `link`, or `link` itself where memory cannot be shared. All ranks call it, and get the same.

    store: of the group. Raises RuntimeError if a rank is missing.
    """
    ballot = Ballot(store, link.rank, link.size)
    places = [Place(**json.loads(place)) for place in ballot.exchange("place", json.dumps(asdict(_place(device))))]
    why_not = ballot.first("peers", obstacle(places, link.rank, nvlink_obstacle))
    if why_not:
        return _without(link, why_not)
    why_not, peers, memory = "", None, None
    try:
        peers, memory = _allocate(store, link, device)
    except (RuntimeError, ImportError, AttributeError) as error:  # a torch without it, a driver that refuses
        why_not = str(error).partition("\n")[0]
    why_not = ballot.first("memory", why_not)
    if why_not:
        return _without(link, why_not)
    assert peers is not None
    shared = SymmetricLink(link, peers, LIMITS[link.size], memory)
    why_not = ballot.first("sums", trial(shared, link.rank, link.size, device))
    if why_not:
        return _without(link, why_not)
    if link.rank == 0:
        log.info("The %s adds up over shared memory, from %d MiB on with NCCL.", link.label, shared.most_bytes // MIB)
    return shared


def _without(link: ProcessGroupLink, why: str) -> Link:
    if link.rank == 0:
        log.info("The %s adds up with NCCL alone: %s.", link.label, why)
    return link


class Ballot:
    """What each rank of a group says, known to all."""

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self._store, self._rank, self._size = dist.PrefixStore("ballot", store), rank, size

    def exchange(self, subject: str, word: str) -> list[str]:
        self._store.set(f"{subject}.{self._rank}", word + ".")  # a store may take an empty value for none
        return [self._store.get(f"{subject}.{rank}").decode()[:-1] for rank in range(self._size)]

    def first(self, subject: str, objection: str) -> str:
        """The first rank's objection that has one."""
        return next(filter(None, self.exchange(subject, objection)), "")


def _place(device: torch.device) -> Place:
    boot = Path("/proc/sys/kernel/random/boot_id")
    node = f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"
    properties = torch.cuda.get_device_properties(device)
    cannot = ""
    if importlib.util.find_spec("triton") is None:
        cannot = "Triton is not installed"
    elif properties.major < 7:
        cannot = f"a {properties.name} has no atomic operations with an order"
    return Place(node, f"GPU-{properties.uuid}", cannot)


def obstacle(places: Sequence[Place], rank: int, nvlinked: NVLinked) -> str:
    """Why `rank` cannot share memory with all of `places`; "" = it can."""
    cannot = next((place.cannot for place in places if place.cannot), "")
    if cannot or len(places) not in LIMITS:
        return cannot or f"it is made for 2 to {max(LIMITS)} ranks"
    if len({place.node for place in places}) > 1:
        return "its ranks are on several nodes"
    if len({place.gpu for place in places}) < len(places):
        return "ranks share a GPU"
    return nvlinked(places[rank].gpu, [place.gpu for i, place in enumerate(places) if i != rank])


_groups = itertools.count()  # of this process, the same on all ranks: torch wants a new name for each


def _allocate(store: dist.Store, link: ProcessGroupLink, device: torch.device) -> tuple[allreduce.Peers, object]:
    """Raises RuntimeError where torch or the driver cannot."""
    from torch._C._distributed_c10d import _register_process_group, _SymmetricMemory

    env.prepare_shared_gpu_memory()
    name = f"octavo {link.label} {next(_groups)}"
    # Versions of torch look for the group's ranks in different places: in one of these two.
    own = dist.PrefixStore("symmetric", store)
    _SymmetricMemory.set_group_info(name, link.rank, link.size, own)
    group = dist.ProcessGroup(own, link.rank, link.size)
    group._register_backend(device, dist.ProcessGroup.BackendType.NCCL, link.backend)
    group._set_group_name(name)
    _register_process_group(name, group)  # keeps no reference
    size = allreduce.buffer_bytes(PART_BYTES)
    buffer = _SymmetricMemory.empty_strided_p2p((size,), (1,), torch.uint8, device, name)
    buffer.zero_()
    torch.cuda.synchronize(device)  # before the rendezvous, which nobody leaves before all have come
    memory = _SymmetricMemory.rendezvous(buffer, name)
    addresses = list(memory.buffer_ptrs)
    if addresses[link.rank] != buffer.data_ptr() or buffer.data_ptr() % 16:
        raise RuntimeError("torch maps symmetric memory in an unknown way")
    peers = allreduce.Peers(
        rank=link.rank,
        size=link.size,
        buffers=torch.tensor(addresses, dtype=torch.int64, device=device),
        calls=torch.zeros(allreduce.PROGRAMS, dtype=torch.int32, device=device),
        part_bytes=PART_BYTES,
    )
    return peers, (buffer, memory, group)


def trial(link: SymmetricLink, rank: int, size: int, device: torch.device) -> str:
    """Adds up known numbers in every way, a few times. What was wrong; "" = nothing."""
    try:
        for turn in range(TURNS):
            for bytes_ in (4096, link.one_shot_bytes, link.most_bytes):
                count = torch.arange(bytes_ // 2, dtype=torch.int32, device=device)
                parts = [((count * (other + 3) + turn) % 16).bfloat16() for other in range(size)]  # sums are exact
                found = link.all_reduce(parts[rank].clone())
                if not torch.equal(found, torch.stack(parts).sum(0)):
                    return f"a sum of {bytes_} bytes over shared memory came out wrong"
    except Exception as error:  # Triton's have no common base
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return ""

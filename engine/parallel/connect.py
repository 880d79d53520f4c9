"""Connects the ranks of a replica: torch.distributed's process groups, as objects, behind the Mesh's groups.

gloo on a CPU, NCCL on CUDA. Nothing global: no init_process_group, no environment, so ranks may be processes on
different nodes or threads of one process. Nobody else calls torch.distributed.
"""

from __future__ import annotations

import socket
from collections import deque
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from octavo.engine.errors import ConfigError, RankLost
from octavo.engine.parallel.layout import Layout
from octavo.engine.parallel.mesh import Group, Link, Mesh
from octavo.kernels.rounded import Rounding

SENDS_IN_FLIGHT = 4  # per peer; more than the steps a pipeline keeps in flight only cost memory
_TWO_PHASES_FROM = 1 << 19  # bytes; below it one exchange of everything is faster than two of parts


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where the ranks of one replica find one another. timeout_s: until all are there. step_timeout_s: of one
    collective, that is how far the slowest rank of a step may lag behind the fastest."""

    host: str
    port: int
    timeout_s: float = 60.0
    step_timeout_s: float = 300.0


class HostedRendezvous:
    """A rendezvous that lives in this process, until `close` or until the object is gone. One per replica.

    host: an address of this node that all ranks reach, and the only one listened on.
    """

    def __init__(self, host: str, timeout_s: float = 60.0, step_timeout_s: float = 300.0) -> None:
        listening = socket.create_server((host, 0))
        port = listening.getsockname()[1]
        self._store: dist.TCPStore | None = dist.TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            master_listen_fd=listening.detach(),
        )
        self.rendezvous = Rendezvous(host, port, timeout_s, step_timeout_s)

    def close(self) -> None:
        self._store = None


def connect(
    layout: Layout,
    rank: int,
    rendezvous: Rendezvous | None,
    device: torch.device,
    custom_all_reduce: bool = True,
) -> Mesh:
    """The mesh of `rank`, connected. All ranks of the layout must call this; returns when those it shares a group with
    have. rendezvous None: a layout of one rank. custom_all_reduce: GPUs that can read one another's memory add up
    small tensors so (see octavo.engine.parallel.symmetric). Raises RankLost if a rank does not come in time."""
    stage, tp_rank = layout.place(rank)
    if layout.size == 1:
        return Mesh()
    if rendezvous is None:
        raise ConfigError(f"A layout of {layout.size} ranks needs a rendezvous.")
    try:
        store = dist.TCPStore(
            rendezvous.host,
            rendezvous.port,
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=rendezvous.timeout_s),
        )
    except RuntimeError as error:
        raise RankLost(
            f"Rank {rank} cannot reach the rendezvous at {rendezvous.host}:{rendezvous.port}: {_first_line(error)}"
        ) from error

    def group(name: str, at: int, ranks: list[int]) -> Group:
        if len(ranks) == 1:
            return Group(name)
        label = f"{name} group of ranks {', '.join(map(str, ranks))}"
        prefix = dist.PrefixStore(f"octavo.{name}.{at}", store)
        link = _link(name, label, prefix, ranks, rank, rendezvous, device, custom_all_reduce)
        return Group(name, ranks.index(rank), len(ranks), link)

    tp = group("tp", stage, [layout.rank(stage, i) for i in range(layout.tp)])
    pp = group("pp", tp_rank, [layout.rank(i, tp_rank) for i in range(layout.pp)])
    return Mesh(tp=tp, pp=pp)


def _link(
    name: str,
    label: str,
    store: dist.Store,
    ranks: list[int],
    rank: int,
    rendezvous: Rendezvous,
    device: torch.device,
    custom_all_reduce: bool,
) -> Link:
    place, size = ranks.index(rank), len(ranks)
    timeouts = rendezvous.timeout_s, rendezvous.step_timeout_s
    try:
        if device.type != "cuda":
            return GlooLink(label, store, place, size, timedelta(seconds=rendezvous.step_timeout_s), rendezvous)
        # Imported where there are GPUs: needs Triton.
        from octavo.engine.parallel.nccl import connect_nccl
        from octavo.engine.parallel.symmetric import share_memory

        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        link = connect_nccl(label, store, place, size, timeouts, device, pipeline=name == "pp")
        return share_memory(link, store, device) if name == "tp" and custom_all_reduce else link
    except RuntimeError as error:
        raise RankLost(
            f"The {label} was not complete within {rendezvous.timeout_s:g} s, seen from rank {rank}: "
            f"{_first_line(error)}"
        ) from error


class ProcessGroupLink:
    """What both kinds have in common: errors, point to point, closing."""

    recordable = fuses_norm = False

    def sum_add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, rounding: Rounding | None
    ) -> None:
        return None

    def __init__(self, label: str, rank: int, size: int, timeout: timedelta) -> None:
        self.label, self.rank, self.size, self.timeout = label, rank, size, timeout
        self._sent: dict[int, deque[tuple[dist.Work, torch.Tensor]]] = {}
        self._backend: dist.distributed_c10d.Backend | None = None

    @property
    def backend(self) -> dist.distributed_c10d.Backend:
        if self._backend is None:
            raise RankLost(f"The {self.label} is closed.")
        return self._backend

    def send(self, x: torch.Tensor, to: int) -> None:
        copy = x.clone(memory_format=torch.contiguous_format)
        try:
            sent = self._sent.setdefault(to, deque())
            while len(sent) >= SENDS_IN_FLIGHT:
                sent.popleft()[0].wait(self.timeout)
            sent.append((self.backend.send([copy], to, 0), copy))
        except RuntimeError as error:
            raise self.lost(f"sending to its member {to}", error) from error

    def recv(self, out: torch.Tensor, source: int) -> None:
        assert out.is_contiguous()
        try:
            self.backend.recv([out], source, 0).wait(self.timeout)  # point to point has no timeout of its own
        except RuntimeError as error:
            raise self.lost(f"receiving from its member {source}", error) from error

    def close(self) -> None:
        backend, self._backend = self._backend, None
        self._sent.clear()
        if backend is not None:
            backend.abort()

    def lost(self, doing: str, error: Exception) -> RankLost:
        return RankLost(f"The {self.label} broke while member {self.rank} was {doing}: {_first_line(error)}")


class GlooLink(ProcessGroupLink):
    """TCP between processes or threads, tensors on the CPU.

    Collectives are made of point to point messages, all under way at once: for the few kilobytes of a decode step a
    third of the time of gloo's own, which go round a ring. And sums are taken in rank order whatever the size of a
    tensor, where a ring's order depends on where in the tensor an element lies: a token's hidden state has the same
    bits in every batch.
    """

    def __init__(
        self, label: str, store: dist.Store, rank: int, size: int, step_timeout: timedelta, rendezvous: Rendezvous
    ) -> None:
        super().__init__(label, rank, size, step_timeout)
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=_own_address(rendezvous))]
        options._timeout = timedelta(seconds=rendezvous.timeout_s)
        options._threads = 1
        gloo = dist.ProcessGroupGloo(store, rank, size, options)
        gloo._set_default_timeout(step_timeout)
        self._backend = gloo
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        try:
            if x.nbytes < _TWO_PHASES_FROM or x.numel() % self.size:
                return self._sum(self._exchange(x, self._room(x)), x)
            flat = x.view(self.size, -1)
            parts = self._room(flat[0])
            self.backend.alltoall_base(parts, flat, [], []).wait()
            return self._exchange(self._sum(parts, flat[self.rank]), flat).view(x.shape)
        except RuntimeError as error:
            raise self.lost("summing", error) from error

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        try:
            return self._exchange(x.contiguous(), x.new_empty((self.size, *x.shape)))
        except RuntimeError as error:
            raise self.lost("gathering", error) from error

    def _exchange(self, mine: torch.Tensor, everyone: torch.Tensor) -> torch.Tensor:
        """everyone: [size, *mine.shape], filled. mine may be its place there."""
        others = [other for other in range(self.size) if other != self.rank]
        backend = self.backend
        received = [backend.recv([everyone[other]], other, 0) for other in others]
        sent = [backend.send([mine], other, 0) for other in others]
        if everyone[self.rank].data_ptr() != mine.data_ptr():
            everyone[self.rank] = mine
        for work in (*received, *sent):
            work.wait(self.timeout)
        return everyone

    @staticmethod
    def _sum(parts: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """parts: [size, ...] → out, in rank order; half precision is rounded once."""
        return out.copy_(sum(parts[1:].float(), parts[0].float())) if out.itemsize < 4 else _add_up(parts, out)

    def _room(self, x: torch.Tensor) -> torch.Tensor:
        """[size, *x.shape], overwritten by the next call: an allocation of megabytes costs more than to fill it."""
        wanted = self.size * x.nbytes
        if self._scratch.numel() < wanted:
            self._scratch = torch.empty(wanted, dtype=torch.uint8)
        return self._scratch[:wanted].view(x.dtype).view(self.size, *x.shape)


def _add_up(parts: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    torch.add(parts[0], parts[1], out=out)
    for part in parts[2:]:
        out += part
    return out


def _own_address(rendezvous: Rendezvous) -> str:
    """This node's address on the way to the rendezvous, which the other ranks can reach too. Sends nothing."""
    family, _, _, _, address = socket.getaddrinfo(rendezvous.host, rendezvous.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def _first_line(error: Exception) -> str:
    """Without the source line in brackets that gloo begins with."""
    line = str(error).partition("\n")[0]
    return line.rpartition("] ")[2].partition(". This is typically")[0].rstrip(".") or type(error).__name__

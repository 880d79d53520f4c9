"""NCCL between the GPUs of a group's ranks, one GPU per process.

Calls are queued on the device, on the stream that is current, and nobody waits for them on the host. So:

- A CUDA graph may hold all_reduce and all_gather (communicators exist before the first step). What a graph replays,
  NCCL's own watchdog does not see: its timeout is of eager calls alone.
- A rank that dies leaves kernels of the others waiting on their devices, and their hosts in the next call that waits
  for the device. No call of ours could raise RankLost then. It need not: a replica ends as one, by the driver, which
  misses the dead rank's pulse and ends the processes of the others; a process takes its kernels along. Where NCCL does
  notice (a lost socket, the timeout of an eager call), torch's watchdog ends the process, which comes to the same.

Sums have the same bits on all ranks: NCCL adds an element up in one place, and sends the result round. In which order
it does depends on the size of the tensor, so a row's bits may depend on the batch.
"""

from __future__ import annotations

from collections import deque
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import AllgatherOptions, AllreduceOptions, Backend

from octavo.engine.parallel.connect import SENDS_IN_FLIGHT, ProcessGroupLink

if TYPE_CHECKING:
    from torch.distributed import Work


def connect_nccl(
    label: str,
    store: dist.Store,
    rank: int,
    size: int,
    timeouts: tuple[float, float],
    device: torch.device,
    pipeline: bool,
) -> NCCLLink:
    """Returns when all ranks of the group have come; raises RuntimeError if they do not in time.

    timeouts: until all are there, of one collective; seconds. pipeline: the group sends from each rank to the next, and
    hardly does anything else: a communicator for each such pair is made now, of the group only when it is needed. A
    pair has a stream of its own, so that a receive does not wait behind a send that nobody takes yet, and neither of
    them behind the sums of the tp group.
    """
    start_s, step_s = timeouts
    # NCCL itself waits without end for ranks that do not come.
    store.set(f"here.{rank}", "")
    store.wait([f"here.{other}" for other in range(size)], timedelta(seconds=start_s))
    torch.cuda.set_device(device)  # of this thread, which is the one that computes
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=step_s)
    link = NCCLLink(label, rank, size, dist.ProcessGroupNCCL(store, rank, size, options))
    if pipeline:
        link.greet_neighbours(device)
    else:
        link.backend.eager_connect_single_device(device)
    return link


class NCCLLink(ProcessGroupLink):
    """backend: a ProcessGroupNCCL."""

    recordable = True

    def __init__(self, label: str, rank: int, size: int, backend: Backend) -> None:
        super().__init__(label, rank, size, timedelta(0))  # the backend's options have the timeout
        self._backend = backend
        # By default the backend queues on a stream of its own, with events before and after: a few microseconds each
        # time, and memory that the allocator has to watch. Nothing of ours runs beside a collective.
        self._reduce, self._gather = AllreduceOptions(), AllgatherOptions()
        self._reduce.asyncOp = self._gather.asyncOp = False

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        try:
            _order(self.backend.allreduce([x], self._reduce))
        except RuntimeError as error:
            raise self.lost("summing", error) from error
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty((self.size, *x.shape))
        try:
            _order(self.backend._allgather_base(out, x.contiguous(), self._gather))
        except RuntimeError as error:
            raise self.lost("gathering", error) from error
        return out

    def send(self, x: torch.Tensor, to: int) -> None:
        """The copy lives until it is sent. Where the other side is too far behind, the stream waits, not the host."""
        sent = self._sent.setdefault(to, deque())
        try:
            while sent and sent[0][0].is_completed():
                sent.popleft()
            if len(sent) >= SENDS_IN_FLIGHT:
                _order(sent.popleft()[0])
            copy = x.clone(memory_format=torch.contiguous_format)
            sent.append((self.backend.send([copy], to, 0), copy))
        except RuntimeError as error:
            raise self.lost(f"sending to its member {to}", error) from error

    def recv(self, out: torch.Tensor, source: int) -> None:
        assert out.is_contiguous()
        try:
            _order(self.backend.recv([out], source, 0))
        except RuntimeError as error:
            raise self.lost(f"receiving from its member {source}", error) from error

    def greet_neighbours(self, device: torch.device) -> None:
        """Make the communicators of all pairs of neighbours: each does on the first message between the two, and waits
        for both."""
        word = torch.zeros(1, device=device)
        if self.rank > 0:
            _order(self.backend.recv([word], self.rank - 1, 0))
        if self.rank < self.size - 1:
            _order(self.backend.send([word], self.rank + 1, 0))
        torch.cuda.synchronize(device)


def _order(work: Work | None) -> None:
    """What is queued from now on comes after the work. No argument: with a timeout the host would wait.

    None: the backend has queued it on the current stream.
    """
    if work is not None:
        work.wait()

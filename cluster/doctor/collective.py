"""An all-reduce over the cluster, checked and timed, by the code that a model's ranks use. No Ray here."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

NUM_ELEMENTS = 1 << 18  # float32: 1 MiB
NUM_BYTES = NUM_ELEMENTS * 4
ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Seats:
    """Which of the `size` ranks a process is, and where all meet: the rendezvous at host:port."""

    ranks: tuple[int, ...]
    size: int
    host: str
    port: int
    timeout_s: float
    backend: Literal["gloo", "nccl"] = "gloo"


def time_all_reduce(seats: Seats) -> tuple[float, str | None]:
    """Be the ranks, on a thread each: (fastest all-reduce of NUM_BYTES, in seconds, of the slowest; why it failed)."""
    with ThreadPoolExecutor(len(seats.ranks)) as pool:
        each = list(pool.map(lambda rank: _one_rank(rank, seats), seats.ranks))
    return max(seconds for seconds, _ in each), next((error for _, error in each if error is not None), None)


def _one_rank(rank: int, seats: Seats) -> tuple[float, str | None]:
    try:
        return _all_reduce(rank, seats), None
    except Exception as error:  # whatever torch raises is the answer
        return 0.0, (str(error).strip().splitlines() or [type(error).__name__])[0]


def _all_reduce(rank: int, seats: Seats) -> float:
    import torch

    from octavo.engine.parallel.connect import Rendezvous, connect
    from octavo.engine.parallel.layout import Layout

    device = torch.device("cuda", 0) if seats.backend == "nccl" else torch.device("cpu")
    rendezvous = Rendezvous(seats.host, seats.port, seats.timeout_s, step_timeout_s=seats.timeout_s)
    mesh = connect(Layout(tp=seats.size), rank, rendezvous, device)
    try:
        base = torch.arange(NUM_ELEMENTS, dtype=torch.float32, device=device) % 97
        wanted = base * seats.size + seats.size * (seats.size - 1) / 2
        best = float("inf")
        for _ in range(ROUNDS):
            x = base + rank
            started = time.perf_counter()
            x = mesh.tp.all_reduce(x)
            if seats.backend == "nccl":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - started)
            if not torch.equal(x, wanted):
                raise ValueError("the sum came out wrong")
        mesh.tp.all_reduce(base)  # nobody leaves before all have what they need
        return best
    finally:
        with suppress(Exception):
            mesh.close()

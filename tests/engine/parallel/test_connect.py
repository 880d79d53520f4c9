"""Collectives over gloo, threads and processes: sums that do not depend on rank or batch, errors that name who."""

import multiprocessing
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from octavo.engine.errors import ConfigError, RankLost
from octavo.engine.parallel.connect import HostedRendezvous, Rendezvous, connect
from octavo.engine.parallel.layout import Layout
from octavo.engine.parallel.mesh import Mesh

sys.path.insert(0, str(Path(__file__).parent))
from ranks import CPU, on_ranks

SIZES = (1, 7, 576, 3 * 1024, 3 * 65536 + 6, 3 * 131072)  # the last two take two phases where they divide


def given(rank: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(rank)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_reduce_is_the_sum_in_rank_order_on_every_rank(size: int, dtype: torch.dtype) -> None:
    def work(mesh: Mesh) -> list[torch.Tensor]:
        return [mesh.tp.all_reduce(given(mesh.tp.rank, n, dtype)).clone() for n in SIZES]

    results = on_ranks(Layout(tp=size), work)
    for i, n in enumerate(SIZES):
        want = given(0, n, dtype).float()
        for rank in range(1, size):
            want += given(rank, n, dtype)
        assert all(torch.equal(got[i], want.to(dtype)) for got in results), n


def test_a_row_has_the_same_sum_alone_and_in_a_batch() -> None:
    def work(mesh: Mesh) -> bool:
        x = given(mesh.tp.rank, 600 * 576, torch.float32).view(600, 576)
        whole = mesh.tp.all_reduce(x.clone()).clone()
        return all(torch.equal(mesh.tp.all_reduce(x[i : i + 1].clone())[0], whole[i]) for i in (0, 250, 599))

    assert all(on_ranks(Layout(tp=3), work))


def test_all_gather_is_in_rank_order() -> None:
    def work(mesh: Mesh) -> torch.Tensor:
        rows = torch.arange(12, dtype=torch.int32).view(4, 3)[:, 1:] + 100 * mesh.tp.rank  # not contiguous
        return mesh.tp.all_gather(rows)

    want = torch.stack([torch.arange(12, dtype=torch.int32).view(4, 3)[:, 1:] + 100 * rank for rank in range(3)])
    assert all(torch.equal(got, want) for got in on_ranks(Layout(tp=3), work))


def test_stages_pass_tensors_on_in_order() -> None:
    """Several are under way at once; a sender's tensor may be overwritten; tp ranks do not mix."""

    def work(mesh: Mesh) -> list[float]:
        x, seen = torch.zeros(5, 4), []
        for step in range(10):
            if not mesh.pp.is_first:
                mesh.pp.recv(x, mesh.pp.rank - 1)
            seen.append(float(x.sum()))
            x += 1 + step + 100 * mesh.tp.rank
            if not mesh.pp.is_last:
                mesh.pp.send(x, mesh.pp.rank + 1)
            x.zero_()
        mesh.pp.all_reduce(x)  # nobody leaves before all has arrived
        return seen

    results = on_ranks(Layout(tp=2, pp=3), work)
    for rank, seen in enumerate(results):
        stage, tp_rank = divmod(rank, 2)
        assert seen == [20.0 * stage * (1 + step + 100 * tp_rank) for step in range(10)]


def test_one_rank_needs_nobody() -> None:
    mesh = connect(Layout(), 0, None, CPU)
    x = torch.ones(3)
    assert mesh.tp.all_reduce(x) is x
    assert mesh.tp.all_gather(x).shape == (1, 3)
    with pytest.raises(ConfigError, match="needs a rendezvous"):
        connect(Layout(tp=2), 0, None, CPU)


def test_a_rank_that_does_not_come_is_an_error() -> None:
    hosted = HostedRendezvous("127.0.0.1", timeout_s=0.5)
    with pytest.raises(RankLost, match=r"The tp group of ranks 0, 1 was not complete within 0.5 s, seen from rank 1"):
        connect(Layout(tp=2), 1, hosted.rendezvous, CPU)
    port = hosted.rendezvous.port
    hosted.close()
    with pytest.raises(RankLost, match=f"Rank 0 cannot reach the rendezvous at 127.0.0.1:{port}"):
        connect(Layout(tp=2), 0, Rendezvous("127.0.0.1", port, 0.5), CPU)


def test_a_rank_that_lags_is_an_error() -> None:
    done = threading.Event()

    def work(mesh: Mesh) -> str:
        if mesh.tp.rank:
            done.wait(10)
            return ""
        try:
            with pytest.raises(
                RankLost, match="The tp group of ranks 0, 1 broke while member 0 was summing: "
            ) as caught:
                mesh.tp.all_reduce(torch.ones(3))
        finally:
            done.set()
        return str(caught.value)

    assert "imed out" in on_ranks(Layout(tp=2), work, step_timeout_s=0.5)[0]


def test_closing_wakes_those_who_wait() -> None:
    def work(mesh: Mesh) -> float:
        if mesh.pp.rank:
            time.sleep(0.2)
            return 0.0
        started = time.monotonic()
        with pytest.raises(
            RankLost, match="The pp group of ranks 0, 1 broke while member 0 was receiving from its member 1"
        ):
            mesh.pp.recv(torch.ones(3), 1)
        return time.monotonic() - started

    assert on_ranks(Layout(pp=2), work)[0] < 5


def _die_after_one(rendezvous: Rendezvous) -> None:
    mesh = connect(Layout(tp=2), 1, rendezvous, CPU)
    mesh.tp.all_reduce(torch.ones(3))
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_noticed_at_once() -> None:
    hosted = HostedRendezvous("127.0.0.1")
    child = multiprocessing.get_context("spawn").Process(target=_die_after_one, args=(hosted.rendezvous,))
    child.start()
    mesh = connect(Layout(tp=2), 0, hosted.rendezvous, CPU)
    assert mesh.tp.all_reduce(torch.ones(3)).tolist() == [2.0] * 3
    started = time.monotonic()
    with pytest.raises(RankLost, match="broke while member 0 was summing"):
        mesh.tp.all_reduce(torch.ones(3))
    assert time.monotonic() - started < 5
    child.join()
    with pytest.raises(RankLost):
        mesh.tp.all_reduce(torch.ones(3))
    mesh.close()

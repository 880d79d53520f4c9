"""Sums over shared memory, ranks as processes: the sum in rank order on every rank, in any sequence of calls."""

import random
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from shared_ranks import PAUSE, on_ranks

from octavo.kernels.rounded import Rounding
from octavo.kernels.triton import add_rms_norm, allreduce
from octavo.kernels.triton.allreduce import Peers

PART = 4096
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-5


def given(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def in_rank_order(parts: list[torch.Tensor]) -> torch.Tensor:
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts[0].dtype)


def small(peers: Peers, calls: int = 0) -> Peers:
    """Kernels of few and small programs, so that a program has several tiles, the last of them not full."""
    allreduce.PROGRAMS, allreduce.TILE = 3, 64
    peers.calls[:] = calls
    return peers


def sum_up(peers: Peers, call: int, chance: random.Random) -> None:
    body = chance.choice((allreduce.one_shot, allreduce.two_shot))
    shape, dtype = (chance.choice((1, 63, 64, 65, chance.randint(1, 1700))),), chance.choice(DTYPES)
    parts = [given(shape, dtype, 10 * call + rank) for rank in range(peers.size)]
    assert allreduce.fits(parts[0], peers)
    mine = parts[peers.rank].clone()
    assert torch.equal(body(mine, peers), in_rank_order(parts)), (call, body, shape, dtype)
    assert torch.equal(mine, parts[peers.rank])


def sum_and_norm(peers: Peers, call: int, chance: random.Random) -> None:
    rows, width, dtype = chance.randint(1, 8), chance.choice((8, 48, 100)), chance.choice(DTYPES)
    parts = [given((rows, width), dtype, 10 * call + rank) for rank in range(peers.size)]
    residual, weight = given((rows, width + 8), dtype, 10 * call + 8)[:, :width], given((width,), dtype, 10 * call + 9)
    assert allreduce.rows_fit(parts[0], peers)
    rounding = chance.choice((None, None, Rounding(torch.float8_e4m3fn, 8), Rounding(torch.int8, width)))
    if width == 100 and rounding is not None:
        rounding = Rounding(rounding.dtype, 20)  # groups that no tile holds: rounded in another launch
    want_norm, want_sum = add_rms_norm(in_rank_order(parts), residual.clone(), weight, EPS, rounding)
    norm, total = allreduce.sum_add_rms_norm(parts[peers.rank], residual, weight, EPS, peers, rounding)
    assert torch.equal(total, want_sum), (call, rows, width, dtype)
    if rounding is not None:
        assert norm.rounding == want_norm.rounding == rounding
        norm, want_norm = norm.numbers(), want_norm.numbers()
    assert torch.equal(norm, want_norm), (call, rows, width, dtype, rounding)


def many_rounds(peers: Peers, seed: int, rounds: int, calls: int) -> list[object]:
    """All ranks draw the same calls, and lag each in its own way. What the last sum and norm gave comes back."""
    small(peers, calls)
    chance, lag = random.Random(seed), random.Random(peers.rank)
    for call in range(rounds):
        chance.choice((sum_up, sum_up, sum_and_norm))(peers, call, chance)
        if lag.random() < 0.2:
            time.sleep(0.003)
    x = given((7, 96), torch.bfloat16, peers.rank)
    norm, total = allreduce.sum_add_rms_norm(x, torch.ones_like(x), torch.ones(96), EPS, peers)
    return [norm.float().tolist(), total.float().tolist(), int(peers.calls[0])]


@pytest.mark.parametrize(("size", "calls"), [(2, 0), (3, (1 << 31) - 5), (4, 0)], ids=["2", "3, counts wrap", "4"])
def test_sums_in_rank_order_in_any_sequence_of_calls(size: int, calls: int) -> None:
    first, *others = on_ranks(size, PART, many_rounds, 77 + size, 16, calls)
    assert all(other == first for other in others)
    if calls:
        assert first[2] < 0, first[2]


def hurry(peers: Peers) -> None:
    """Rank 0 reads what the others have written long after they were free to go on. One program: in the interpreter,
    nobody gets to the next call before rank 0 has begun with the last program of this one."""
    small(peers)
    allreduce.PROGRAMS = 1
    parts = [given((4, 50), torch.float32, rank) for rank in range(peers.size)]
    want = in_rank_order(parts)
    weight, residual = torch.ones(50), torch.zeros(4, 50)
    PAUSE.seconds = 0.03 if peers.rank == 0 else 0.0

    def with_norm(x: torch.Tensor, peers: Peers) -> torch.Tensor:
        return allreduce.sum_add_rms_norm(x, residual.zero_(), weight, EPS, peers)[1]

    for body in (allreduce.one_shot, allreduce.two_shot, with_norm):
        for times in range(1, 5):
            torch.testing.assert_close(body(parts[peers.rank] * times, peers), want * times)


def test_nobody_overwrites_what_a_slow_rank_has_yet_to_read() -> None:
    on_ranks(2, PART, hurry)


def as_it_is(peers: Peers) -> None:
    """The sizes that GPUs will use, once."""
    for shape, dtype in (((5000,), torch.float32), ((3, 3000), torch.bfloat16)):
        parts = [given(shape, dtype, rank) for rank in range(peers.size)]
        want = in_rank_order(parts)
        assert torch.equal(allreduce.one_shot(parts[peers.rank], peers), want)
        assert torch.equal(allreduce.two_shot(parts[peers.rank], peers), want)
    assert allreduce.one_shot(torch.empty(0, 8), peers).shape == (0, 8)
    residual = given((3, 3000), torch.bfloat16, 9)
    _, total = allreduce.sum_add_rms_norm(parts[peers.rank], residual.clone(), torch.ones(3000), EPS, peers)
    assert torch.equal(total, want + residual)


def test_programs_of_full_size() -> None:
    on_ranks(2, 16 << 10, as_it_is)


def test_room() -> None:
    peers = Peers(0, 2, torch.zeros(2, dtype=torch.int64), torch.zeros(64, dtype=torch.int32), 16 << 10)
    assert peers.most_bytes == 1 << 20
    assert allreduce.fits(torch.empty(1 << 19, dtype=torch.bfloat16), peers)
    assert not allreduce.fits(torch.empty((1 << 19) + 1, dtype=torch.bfloat16), peers)
    assert allreduce.rows_fit(torch.empty(128, 4096, dtype=torch.bfloat16), peers)
    assert not allreduce.rows_fit(torch.empty(129, 4096, dtype=torch.bfloat16), peers)
    assert not allreduce.rows_fit(torch.empty(1, 8193, dtype=torch.bfloat16), peers)
    assert not allreduce.rows_fit(torch.empty(64, dtype=torch.bfloat16), peers)

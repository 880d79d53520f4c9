"""A query's attention has the same bits whatever else is in the step, on every instruction set of this machine.

Each case has a few sequences. What one call gives for each as a whole prompt, alone and on one thread, is what every
other way must give, bit for bit: token by token, in chunks, mixed with others, in other blocks, on two threads.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from octavo.kernels import cpu
from octavo.kernels.cpu.library import runnable
from octavo.kernels.ops import AttentionBatch

CACHES = (torch.float32, torch.bfloat16, torch.int8)

pytestmark = pytest.mark.skipif(not runnable(), reason="no CPU library was built")


@dataclass(frozen=True)
class Case:
    heads: int
    kv_heads: int
    head_size: int
    contexts: tuple[int, ...]
    window: int | None = None
    soft_cap: float | None = None
    dtype: torch.dtype = torch.float32


CASES = {
    "one token": Case(2, 1, 64, (1,)),
    "block and chunk boundaries": Case(3, 3, 64, (15, 16, 17, 63, 64, 65, 128)),
    "part boundaries": Case(6, 2, 64, (511, 512, 513, 1030)),
    "bfloat16 queries": Case(6, 2, 64, (20, 520), dtype=torch.bfloat16),
    "one KV head": Case(9, 1, 64, (1, 77, 140)),
    "head size 8": Case(2, 2, 8, (5, 70)),
    "head size 72": Case(4, 2, 72, (5, 70)),
    "head size 80": Case(4, 2, 80, (5, 70)),
    "head size 96": Case(4, 1, 96, (5, 70)),
    "head size 128": Case(8, 2, 128, (33, 540)),
    "head size 256": Case(4, 2, 256, (5, 70)),
    "a window of one": Case(4, 2, 64, (5, 70), window=1),
    "a small window": Case(4, 2, 64, (5, 70, 150), window=7),
    "a window across parts": Case(6, 2, 64, (90, 1100), window=600),
    "a soft cap": Case(4, 2, 64, (5, 130, 530), soft_cap=2.0),
    "a window and a soft cap": Case(7, 1, 64, (5, 130, 600), window=100, soft_cap=5.0),
}

Rows = list[tuple[int, int, int]]  # (sequence, first position of the step, position after the last)


class Sequences:
    """The queries, keys and values of a case, at every position."""

    def __init__(self, case: Case, cache_dtype: torch.dtype, body: cpu.Body) -> None:
        self.case, self.cache_dtype, self.body = case, cache_dtype, body
        kv_heads, head_size = case.kv_heads, case.head_size
        self.query = [torch.randn(n, case.heads, head_size).to(case.dtype) * 2 for n in case.contexts]
        self.key = [torch.randn(n, kv_heads, head_size).to(case.dtype) for n in case.contexts]
        self.value = [torch.randn(n, kv_heads, head_size).to(case.dtype) for n in case.contexts]

    def attend(self, rows: Rows, block_size: int, threads: int) -> list[torch.Tensor]:
        """One step with these rows. The KV lies in random blocks of a pool that is NaN elsewhere."""
        case = self.case
        counts = [-(-last // block_size) for _, _, last in rows]
        order = torch.randperm(sum(counts) + 3, dtype=torch.int32)
        row_size = case.head_size + (4 if self.cache_dtype == torch.int8 else 0)
        shape = (len(order), case.kv_heads, block_size, row_size)
        fill = -1 if self.cache_dtype == torch.int8 else float("nan")  # a scale whose bits are all set is NaN too
        caches = [torch.full(shape, fill, dtype=self.cache_dtype) for _ in range(2)]
        tables = torch.zeros(len(rows), max(counts) + 1, dtype=torch.int32)
        torch.set_num_threads(threads)
        for row, (sequence, _, last) in enumerate(rows):
            tables[row, : counts[row]], order = order[: counts[row]], order[counts[row] :]
            at = torch.arange(last)
            slots = tables[row].long()[at // block_size] * block_size + at % block_size
            self.body.write_kv(self.key[sequence][:last], self.value[sequence][:last], caches[0], caches[1], slots)
        widths = [last - first for _, first, last in rows]
        batch = AttentionBatch(
            block_tables=tables,
            query_start=torch.tensor([0, *widths]).cumsum(0).to(torch.int32),
            context_lens=torch.tensor([last for _, _, last in rows], dtype=torch.int32),
            slot_mapping=torch.full((sum(widths),), -1),
            max_query_len=max(widths),
            max_context_len=max(last for _, _, last in rows),
        )
        query = torch.cat([self.query[sequence][first:last] for sequence, first, last in rows])
        scale = case.head_size**-0.5
        out = self.body.paged_attention(query, caches[0], caches[1], batch, scale, case.window, case.soft_cap)
        return list(out.split(widths))


def random_rows(contexts: tuple[int, ...], chance: random.Random) -> Rows:
    """Some of the sequences, each with one token, a few or many; the same sequence may come several times."""
    rows = []
    for sequence in chance.choices(range(len(contexts)), k=chance.randint(1, 6)):
        last = chance.randint(1, contexts[sequence])
        width = min(last, chance.choice((1, 1, 2, 3, 9, 40, 200)))
        rows.append((sequence, last - width, last))
    return rows


@pytest.fixture(params=list(runnable()) or ["none"])
def body(request: pytest.FixtureRequest) -> cpu.Body:
    loaded = cpu.load(request.param)
    assert loaded is not None
    return loaded


@pytest.fixture(params=CACHES, ids=["float32 cache", "bfloat16 cache", "int8 cache"])
def cache_dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CASES)
def test_a_query_has_the_same_bits_in_every_step(body: cpu.Body, cache_dtype: torch.dtype, name: str) -> None:
    case, chance = CASES[name], random.Random(name)
    sequences = Sequences(case, cache_dtype, body)
    expected = [sequences.attend([(s, 0, n)], 16, threads=1)[0] for s, n in enumerate(case.contexts)]
    assert all(out.isfinite().all() for out in expected)
    last_tokens = [(s, n - 1, n) for s, n in enumerate(case.contexts)]
    everything = [(s, 0, n) for s, n in enumerate(case.contexts)]
    steps = [last_tokens, everything, *(last_tokens[s : s + 1] for s in range(len(case.contexts)))]
    steps += [random_rows(case.contexts, chance) for _ in range(8)]
    for rows in steps:
        block_size, threads = chance.choice((8, 16, 24, 128)), chance.choice((1, 2))
        for (sequence, first, last), out in zip(rows, sequences.attend(rows, block_size, threads), strict=True):
            assert torch.equal(out, expected[sequence][first:last]), (rows, sequence, first, last, block_size, threads)


def test_a_long_range_has_the_same_bits_shared_or_not(body: cpu.Body, cache_dtype: torch.dtype) -> None:
    """One sequence is split among threads, many of them are not; either may visit the parts at once or in turn."""
    sequences = Sequences(Case(4, 2, 64, (2100,) * 9), cache_dtype, body)
    together = sequences.attend([(s, 2099, 2100) for s in range(9)], 16, threads=2)
    for s in (0, 8):
        for threads in (1, 2, 3):
            assert torch.equal(sequences.attend([(s, 2099, 2100)], 16, threads)[0], together[s])

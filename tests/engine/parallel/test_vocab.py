"""Gathered rows are as good as whole ones: on every rank the sampler draws from them what it draws from all logits."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from octavo.engine.core.plan import NewSequence, RowResult
from octavo.engine.parallel.layout import Layout
from octavo.engine.parallel.mesh import Mesh
from octavo.engine.params import SamplingParams
from octavo.engine.runner.sampler import Sampler
from octavo.engine.runner.sampling_state import SamplingState
from octavo.engine.runner.vocab import VocabGather
from octavo.kernels import ops

sys.path.insert(0, str(Path(__file__).parent))
from ranks import CPU, on_ranks

SLOTS, MAX_LEN, STEPS = 12, 64, 12
GREEDY = SamplingParams(temperature=0.0)
KINDS = {
    "greedy": GREEDY,
    "top_k": SamplingParams(temperature=1.0, top_k=5),
    "top_k 1": SamplingParams(temperature=0.7, top_k=1),
    "top_k and more": SamplingParams(temperature=1.3, top_k=20, top_p=0.8, min_p=0.01),
    "large top_k": SamplingParams(temperature=1.0, top_k=90),
    "top_p": SamplingParams(temperature=1.0, top_p=0.9),
    "all": SamplingParams(temperature=2.0),
    "greedy, penalties": SamplingParams(temperature=0.0, repetition_penalty=1.5, presence_penalty=0.5),
    "greedy, min_tokens": SamplingParams(temperature=0.0, min_tokens=4),
    "greedy, bias": SamplingParams(temperature=0.0, logit_bias={3: 2.0, 80: -5.0}),
    "top_k, allowed": SamplingParams(temperature=1.0, top_k=3, allowed_token_ids=[1, 70, 71, 150]),
    "greedy, logprobs": SamplingParams(temperature=0.0, logprobs=3),
    "top_k, logprobs": SamplingParams(temperature=1.0, top_k=4, logprobs=2),
    "top_k, bad words": SamplingParams(temperature=1.0, top_k=4),
}


class Side:
    """A sampler with its state. Slot i holds kinds[i]."""

    def __init__(self, kinds: list[str], vocab: int, body: str) -> None:
        self.ops = ops.select(CPU, torch.float32, force=body)
        self.sampler, self.state = Sampler(self.ops), SamplingState(SLOTS, MAX_LEN, vocab, CPU)
        self.tokens = torch.zeros((SLOTS, MAX_LEN + 1), dtype=torch.int32)
        for slot, kind in enumerate(kinds):
            words = ((7,), (9, 4)) if "bad words" in kind else ()
            self.state.enter(NewSequence(slot, (5, 9), 2, KINDS[kind], 77 + slot, (), (11, 60), words))

    def sample(self, logits: torch.Tensor, slots: np.ndarray, step: int) -> tuple[RowResult, ...]:
        positions = np.full(len(slots), 2 + step)
        sampled = self.sampler.sample(logits, slots, positions, self.state, self.tokens)
        self.tokens[torch.from_numpy(slots), 2 + step] = sampled.token_ids.int()
        return sampled.to_host()


def steps(seed: int, kinds: list[str], vocab: int):
    """(slots, logits) of each step: some rows of the batch, some logits that tie, are -inf, or are no numbers."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(STEPS):
        count = 1 + int(torch.randint(len(kinds), (1,), generator=generator))
        slots = torch.randperm(len(kinds), generator=generator)[:count].numpy()
        logits = 4 * torch.randn(count, vocab, generator=generator)
        if step % 3 == 1:
            logits = logits.round()  # many ties, also at the edges and across ranks
        if step % 4 == 2:
            logits[torch.rand(count, vocab, generator=generator) < 0.7] = -torch.inf
        if step == 7:
            logits[0, int(torch.randint(vocab, (1,), generator=generator))] = torch.nan
            logits[-1, int(torch.randint(vocab, (1,), generator=generator))] = torch.inf
        if step == 8:
            logits[0] = -torch.inf
        if step == 9:
            logits[:] = 1.5
        yield step, slots, logits


@pytest.mark.parametrize("body", ["ref", "cpu"])
@pytest.mark.parametrize(("size", "vocab"), [(2, 192), (3, 191), (4, 1000), (2, 64 * 200)])
@pytest.mark.parametrize("chosen", ["greedy", "top_k", "greedy and top_k", "everything"])
def test_draws_are_those_from_whole_rows(chosen: str, size: int, vocab: int, body: str) -> None:
    kinds = {
        "greedy": ["greedy"] * 6,
        "top_k": ["top_k", "top_k 1", "top_k and more", "large top_k", "top_k"],
        "greedy and top_k": ["greedy", "top_k", "greedy", "top_k and more"],
        "everything": sorted(KINDS)[:SLOTS],
    }[chosen]

    def work(mesh: Mesh) -> list[tuple[RowResult, ...]]:
        shares = mesh.tp.shares(vocab, 64)
        mine = shares[mesh.tp.rank]
        side = Side(kinds, vocab, body)
        vocab_gather = VocabGather(side.ops, mesh.tp, shares)
        results = []
        for step, slots, logits in steps(size, kinds, vocab):
            local = logits[:, mine.start : mine.stop].contiguous()
            rows = vocab_gather.gather(local, slots, np.full(len(slots), 2 + step), side.state)
            results.append(side.sample(rows, slots, step))
        return results

    whole = Side(kinds, vocab, body)
    want = [whole.sample(logits.clone(), slots, step) for step, slots, logits in steps(size, kinds, vocab)]
    assert any(row.error for rows in want for row in rows)
    for got in on_ranks(Layout(tp=size), work):
        assert got == want


def test_what_is_sent_is_what_the_draws_need() -> None:
    vocab, rows = 128_256, 8

    def sent(mesh: Mesh, kind: str) -> int:
        shares = mesh.tp.shares(vocab, 64)
        side = Side([kind] * rows, vocab, "cpu")
        gather = VocabGather(side.ops, mesh.tp, shares)
        local = torch.randn(rows, len(shares[mesh.tp.rank]))
        gather.gather(local, np.arange(rows), np.full(rows, 2), side.state)
        return gather.bytes_received

    for mesh_bytes in on_ranks(Layout(tp=2), lambda mesh: [sent(mesh, kind) for kind in ("greedy", "top_k", "top_p")]):
        assert mesh_bytes == [rows * 8, rows * 6 * 8, rows * vocab // 2 * 4]


def test_one_rank_gathers_nothing() -> None:
    local = torch.randn(3, 10)
    gather = VocabGather(ops.select(CPU, torch.float32), Mesh().tp, (range(10),))
    assert gather.gather(local, [0, 1, 2], [2, 2, 2], SamplingState(4, 8, 10, CPU)) is local

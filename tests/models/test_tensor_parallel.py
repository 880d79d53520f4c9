"""The same model cut over tp ranks gives the logits of the whole one. Ranks are threads, collectives a barrier."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from octavo.engine.errors import ConfigError
from octavo.engine.layers.linear import kv_head_range
from octavo.engine.loader.assign import init_dummy
from octavo.engine.models.registry import build_model
from octavo.engine.parallel.mesh import Group, Mesh

sys.path.insert(0, str(Path(__file__).parent))
import tiny
from paged import PagedModel, context, ours

BATCH = [(0, 5), (1, 23), (2, 1)]


@dataclass
class Meeting:
    """Where the threads of a group exchange tensors."""

    size: int
    barrier: threading.Barrier = field(init=False)
    given: dict[int, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self):
        self.barrier = threading.Barrier(self.size, timeout=30)

    def exchange(self, rank, x):
        self.given[rank] = x
        self.barrier.wait()
        everyone = [self.given[i] for i in range(self.size)]
        self.barrier.wait()
        return everyone


@dataclass(frozen=True, slots=True)
class ThreadGroup(Group):
    meeting: Meeting | None = None

    def all_reduce(self, x):
        return torch.stack(self.meeting.exchange(self.rank, x)).sum(0)

    def all_gather(self, x, dim=-1):
        return torch.cat(self.meeting.exchange(self.rank, x), dim=dim)


def rank_contexts(size):
    meeting = Meeting(size)
    return [context(mesh=Mesh(tp=ThreadGroup("tp", rank, size, meeting))) for rank in range(size)]


def logits(model, vocab_size=tiny.VOCAB):
    paged = PagedModel(model, [[token % vocab_size for token in prompt] for prompt in tiny.prompts()])
    paged.step(BATCH)
    return [torch.stack(paged.logits[sequence]) for sequence, _ in BATCH]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "name", ["llama", "llama-bias", "llama-one-kv-head", "qwen3-window", "phi3", "gemma2", "gpt2", "opt-350m"]
)
def test_ranks_agree_with_the_whole_model(name, size):
    reference = tiny.model(name)
    want = logits(ours(reference))
    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(lambda ctx: logits(ours(reference, ctx)), rank_contexts(size)))
    for got in results:
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_vocabulary_that_does_not_divide_is_padded():
    config = tiny.config("llama-bias")
    config.vocab_size, config.architectures = 191, ["LlamaForCausalLM"]

    def run(ctx):
        model = build_model(config, ctx)
        init_dummy(model, seed=3)
        return logits(model, 191)

    want = run(context())
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(run, rank_contexts(4)))[3]
    assert got[1].shape == (23, 191)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_kv_specs_are_per_rank():
    config = tiny.model("llama-one-kv-head").config
    specs = build_model(config, rank_contexts(2)[1]).kv_specs()
    assert [spec.num_kv_heads for spec in specs] == [1, 1, 1]


def test_kv_heads_are_shared_or_copied():
    assert [kv_head_range(Group("tp", rank, 2), 4) for rank in range(2)] == [(0, 2), (2, 2)]
    assert [kv_head_range(Group("tp", rank, 4), 2) for rank in range(4)] == [(0, 1), (0, 1), (1, 1), (1, 1)]
    with pytest.raises(ConfigError, match="KV heads"):
        kv_head_range(Group("tp", 0, 4), 3)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="split over 3 tp ranks"):
        build_model(tiny.model("llama").config, context(mesh=Mesh(tp=Group("tp", 0, 3))))

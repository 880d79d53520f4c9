"""The whole engine against transformers' greedy output, under every condition that scheduling can put a sequence in.

The checkpoints are tests/models/tiny.py's: small, random, float32, on disk. Every family goes through a batch of
prompts of different length, chunks smaller than a prompt, preemption in a pool that is too small, and prefix hits.
"""

import importlib.util
from pathlib import Path

import pytest

from octavo.engine.build import build_engine
from octavo.engine.config import EngineConfig
from octavo.engine.core.engine import EngineCore
from octavo.engine.params import SamplingParams
from octavo.engine.types import Request

_spec = importlib.util.spec_from_file_location("tiny", Path(__file__).parents[1] / "models" / "tiny.py")
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

PROMPTS = tiny.prompts((5, 23, 1, 40, 33, 12))
NEW = 24
CONDITIONS = {
    "whole prompts": {},
    "without overlap": {"async_scheduling": False},
    "chunks of 16": {"max_num_batched_tokens": 16, "max_num_seqs": 16},
    "preemption": {"num_gpu_blocks_override": 14, "enable_prefix_caching": False},
    "preemption with prefix hits": {"num_gpu_blocks_override": 14},
}


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def family(request, tmp_path_factory):
    folder = tiny.make(request.param, tmp_path_factory.mktemp("checkpoints"))
    return folder, tiny.reference_greedy(folder, PROMPTS, NEW)


def start(folder: Path, **options: object) -> EngineCore:
    settings = {
        "dtype": "float32",
        "block_size": 8,
        "max_model_len": 64,
        "max_num_seqs": 8,
        "num_gpu_blocks_override": 200,
    }
    return build_engine(EngineConfig(model=str(folder), **settings | options)).core


def generate(core: EngineCore, prompts: list[list[int]], tag: str = "", **params: object) -> list[list[int]]:
    wanted = SamplingParams(**{"temperature": 0.0, "max_tokens": NEW, "ignore_eos": True} | params)
    for i, prompt in enumerate(prompts):
        core.add(Request(f"{tag}{i}", tuple(prompt), wanted))
    got: dict[str, list[int]] = {f"{tag}{i}": [] for i in range(len(prompts))}
    while core.has_work:
        for delta in core.step():
            assert delta.error is None, delta.error
            got[delta.request_id].extend(delta.token_ids)
        core.scheduler.pool.check()
    return list(got.values())


@pytest.mark.parametrize("condition", CONDITIONS)
def test_greedy_tokens_equal_transformers(family, condition):
    folder, expected = family
    core = start(folder, **CONDITIONS[condition])
    try:
        assert generate(core, PROMPTS) == expected
        stats = core.stats()
        assert (stats.preemptions > 0) == ("preemption" in condition)
        if condition == "whole prompts":
            assert generate(core, PROMPTS, "again") == expected
            assert core.stats().prefix_hits > 80
    finally:
        core.close()

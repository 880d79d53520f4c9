"""KV stored in another type than the model's: the same tokens however they were scheduled, and near to exact ones.

The checkpoints are tests/models/tiny.py's. int8 is rounded per token and head, so a token's KV must not depend on who
was in the step with it; prefix hits, copies of blocks and chunks must carry the scales along.
"""

import importlib.util
from pathlib import Path

import pytest
import torch

from octavo.engine.build import build_engine
from octavo.engine.config import EngineConfig
from octavo.engine.core.engine import EngineCore
from octavo.engine.errors import ConfigError
from octavo.engine.layers.kv import KVSpec
from octavo.engine.params import SamplingParams
from octavo.engine.runner.build import pick_kv_dtype
from octavo.engine.runner.kv_pool import KVPool
from octavo.engine.types import Request

_spec = importlib.util.spec_from_file_location("tiny", Path(__file__).parents[1] / "models" / "tiny.py")
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

PROMPTS = tiny.prompts((5, 23, 1, 40, 33, 12))
NEW = 24
CONDITIONS = {
    "without overlap": {"async_scheduling": False},
    "chunks of 16": {"max_num_batched_tokens": 16, "max_num_seqs": 16},
    "one at a time": {"max_num_seqs": 1},
    "preemption": {"num_gpu_blocks_override": 14, "enable_prefix_caching": False},
    "preemption with prefix hits": {"num_gpu_blocks_override": 14},
}


@pytest.fixture(scope="module", params=["llama", "mistral", "gemma2"])
def folder(request, tmp_path_factory):
    return tiny.make(request.param, tmp_path_factory.mktemp("checkpoints"))


def start(folder: Path, **options: object) -> EngineCore:
    settings = {
        "dtype": "float32",
        "block_size": 8,
        "max_model_len": 64,
        "max_num_seqs": 8,
        "num_gpu_blocks_override": 200,
    }
    return build_engine(EngineConfig(model=str(folder), **settings | options)).core


def generate(core: EngineCore, tag: str = "", **params: object) -> tuple[list[list[int]], list[float]]:
    """The tokens of every prompt, and the log probability of each prompt's first."""
    wanted = SamplingParams(**{"temperature": 0.0, "max_tokens": NEW, "ignore_eos": True, "logprobs": 0} | params)
    for i, prompt in enumerate(PROMPTS):
        core.add(Request(f"{tag}{i}", tuple(prompt), wanted))
    tokens: dict[str, list[int]] = {f"{tag}{i}": [] for i in range(len(PROMPTS))}
    first: dict[str, float] = {}
    while core.has_work:
        for delta in core.step():
            assert delta.error is None, delta.error
            tokens[delta.request_id].extend(delta.token_ids)
            if delta.logprobs:
                first.setdefault(delta.request_id, delta.logprobs[0].logprobs[0])
        core.scheduler.pool.check()
    return list(tokens.values()), [first[name] for name in tokens]


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_tokens_do_not_depend_on_the_schedule(folder, kv_dtype):
    core = start(folder, kv_cache_dtype=kv_dtype)
    try:
        expected, first = generate(core)
        assert generate(core, "again") == (expected, first)
        assert core.stats().prefix_hits > 80
    finally:
        core.close()
    for condition, options in CONDITIONS.items():
        core = start(folder, kv_cache_dtype=kv_dtype, **options)
        try:
            assert generate(core) == (expected, first), condition
            assert (core.stats().preemptions > 0) == ("preemption" in condition)
        finally:
            core.close()


@pytest.mark.parametrize("kernels", [None, "ref"])
def test_tokens_are_near_to_those_of_exact_kv(folder, kernels):
    found = {}
    for kv_dtype in ("auto", "float32", "bfloat16", "int8"):
        core = start(folder, kv_cache_dtype=kv_dtype, kernels=kernels)
        try:
            found[kv_dtype] = generate(core, max_tokens=1)
        finally:
            core.close()
    assert found["auto"] == found["float32"]
    exact = torch.tensor(found["float32"][1])
    for kv_dtype in ("bfloat16", "int8"):
        torch.testing.assert_close(torch.tensor(found[kv_dtype][1]), exact, rtol=0, atol=0.1)
        assert found[kv_dtype] != found["float32"], "nothing was rounded"


def test_samples_of_one_prompt_share_blocks_with_their_scales(folder):
    """Parallel samples copy the last block on write. Drawn from the likeliest token alone, they agree with one."""
    core = start(folder, kv_cache_dtype="int8")
    try:
        alone, _ = generate(core)
        core.add(Request("many", tuple(PROMPTS[3]), SamplingParams(top_k=1, max_tokens=NEW, ignore_eos=True, n=3)))
        got: dict[int, list[int]] = {}
        while core.has_work:
            for delta in core.step():
                got.setdefault(delta.index, []).extend(delta.token_ids)
        assert list(got.values()) == [alone[3]] * 3
    finally:
        core.close()


def test_the_pool_has_room_for_the_scales():
    spec = KVSpec(2, 64, "int8")
    assert spec.bytes_per_token == 2 * 2 * (64 + 4)
    pool = KVPool.allocate([spec], 3, 16, torch.device("cpu"))
    (key_cache, _) = pool.caches[0]
    assert (key_cache.shape, key_cache.dtype) == ((3, 2, 16, 68), torch.int8)


def test_impossible_types_are_refused():
    with pytest.raises(ConfigError, match="kv_cache_dtype must be one of auto, float32, bfloat16, int8, got 'fp8'"):
        EngineConfig(kv_cache_dtype="fp8")
    with pytest.raises(ConfigError, match="int8 runs on CPU only"):
        pick_kv_dtype("int8", torch.bfloat16, torch.device("cuda"))
    assert pick_kv_dtype("auto", torch.bfloat16, torch.device("cuda")) == torch.bfloat16

"""KV stored in another type than the model's: the same tokens however they were scheduled, and near to exact ones.

The checkpoints are tests/models/tiny.py's. int8 and fp8 are rounded per token and head, so a token's KV must not depend
on who was in the step with it; prefix hits, copies of blocks and chunks must carry the scales along.

fp8 is not for the native CPU ops: it runs with `ref`, and with the Triton bodies in Triton's interpreter.
"""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from launchers import Threads

from octavo.engine.build import Phases, assemble, build_engine
from octavo.engine.config import EngineConfig
from octavo.engine.core.engine import EngineCore
from octavo.engine.errors import ConfigError
from octavo.engine.layers.kv import KVSpec
from octavo.engine.parallel.layout import Layout
from octavo.engine.params import SamplingParams
from octavo.engine.process.ranks import Deadlines, Ranks
from octavo.engine.runner.build import pick_kv_dtype
from octavo.engine.runner.kv_pool import KVPool
from octavo.engine.types import Request
from octavo.kernels import ops


def _module(name: str, *path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1].joinpath(*path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny = _module("tiny", "models", "tiny.py")
exact = _module("interpreter", "kernels", "triton", "conftest.py").exact  # the interpreter rounds as GPUs do

PROMPTS = tiny.prompts((5, 23, 1, 40, 33, 12))
NEW = 24
NEAR = {"bfloat16": 0.1, "int8": 0.1, "fp8": 0.5}  # in log probability: fp8 keeps 3 bits behind the first
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


SETTINGS = {
    "dtype": "float32",
    "block_size": 8,
    "max_model_len": 64,
    "max_num_seqs": 8,
    "num_gpu_blocks_override": 200,
}


def start(folder: Path, **options: object) -> EngineCore:
    return build_engine(EngineConfig(model=str(folder), **SETTINGS | options)).core


def generate(
    core: EngineCore, tag: str = "", prompts: list[list[int]] = PROMPTS, **params: object
) -> tuple[list[list[int]], list[float]]:
    """The tokens of every prompt, and the log probability of each prompt's first."""
    wanted = SamplingParams(**{"temperature": 0.0, "max_tokens": NEW, "ignore_eos": True, "logprobs": 0} | params)
    for i, prompt in enumerate(prompts):
        core.add(Request(f"{tag}{i}", tuple(prompt), wanted))
    tokens: dict[str, list[int]] = {f"{tag}{i}": [] for i in range(len(prompts))}
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


def test_tokens_with_fp8_do_not_depend_on_the_schedule(tmp_path):
    """With `ref`, whose sums depend in their last bits on who else is in the step: where that moves a number over the
    edge between two of fp8's, log probabilities differ a little."""
    folder = tiny.make("mistral", tmp_path)
    found = []
    for options in ({}, {"max_num_batched_tokens": 16}, {"num_gpu_blocks_override": 9}):
        core = start(folder, kv_cache_dtype="fp8", kernels="ref", **options)
        try:
            found += [generate(core, tag, prompts=PROMPTS[1:4:2], max_tokens=9) for tag in ("", "again")]
            assert core.stats().prefix_hits >= 16
            assert (core.stats().preemptions > 0) == ("num_gpu_blocks_override" in options)
        finally:
            core.close()
    for tokens, first in found:
        assert tokens == found[0][0]
        assert first == pytest.approx(found[0][1], abs=1e-3)


@pytest.mark.parametrize(("kv_dtype", "kernels"), [("int8", None), ("fp8", "ref")])
def test_ranks_that_share_the_heads_store_what_one_does(kv_dtype, kernels, tmp_path):
    """A scale is of a token and head, so no rank needs another's; sums over ranks differ in their last bits."""
    folder = tiny.make("llama", tmp_path)
    options = {"kv_cache_dtype": kv_dtype, "kernels": kernels, "max_num_batched_tokens": 16}
    found = []
    for size in (1, 2):
        core = start_ranks(folder, size, **options) if size > 1 else start(folder, **options)
        try:
            found.append(generate(core, prompts=PROMPTS[:4], max_tokens=6))
        finally:
            core.close()
    (tokens, first), (of_ranks, first_of_ranks) = found
    assert of_ranks == tokens
    assert first_of_ranks == pytest.approx(first, abs=1e-3)


def start_ranks(folder: Path, size: int, **options: object) -> EngineCore:
    """Ranks are threads, and gloo is between them."""
    config = EngineConfig(model=str(folder), tensor_parallel_size=size, **SETTINGS | options)
    ranks = Ranks(config, Layout(tp=size), Threads(), Deadlines(hang_s=60), Phases(None))
    return assemble(config, ranks.info, ranks).core


@pytest.mark.parametrize("kernels", [None, "ref"])
def test_tokens_are_near_to_those_of_exact_kv(folder, kernels):
    found = {}
    rounded = ("bfloat16", "int8", "fp8") if kernels == "ref" else ("bfloat16", "int8")
    for kv_dtype in ("auto", "float32", *rounded):
        core = start(folder, kv_cache_dtype=kv_dtype, kernels=kernels)
        try:
            found[kv_dtype] = generate(core, max_tokens=1)
        finally:
            core.close()
    assert found["auto"] == found["float32"]
    unrounded = torch.tensor(found["float32"][1])
    for kv_dtype in rounded:
        torch.testing.assert_close(torch.tensor(found[kv_dtype][1]), unrounded, rtol=0, atol=NEAR[kv_dtype])
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


@pytest.mark.parametrize(("kv_dtype", "head_dim"), [("int8", 64), ("fp8", 64), ("fp8", 128)])
def test_triton_bodies_store_what_the_definition_says(kv_dtype, head_dim, tmp_path):
    """Chunks, prefix hits and parallel samples of one prompt, in Triton's interpreter and with `ref`."""
    folder = tmp_path / "llama"
    tiny.model("llama", head_dim=head_dim, num_hidden_layers=1).save_pretrained(folder)
    found = {}
    for kernels in ("triton", "ref"):
        options = {"max_num_batched_tokens": 16, "max_num_seqs": 4, "num_gpu_blocks_override": 20}
        core = start(folder, kv_cache_dtype=kv_dtype, kernels=kernels, **options)
        try:
            found[kernels] = short_answers(core)
        finally:
            core.close()
    (triton, ref) = (found[kernels] for kernels in ("triton", "ref"))
    assert triton[0] == ref[0]
    assert triton[1] == pytest.approx(ref[1], abs=1e-3)


def short_answers(core: EngineCore) -> tuple[dict[tuple[str, int], list[int]], list[float]]:
    """Tokens of every sequence, and log probabilities of them all."""
    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True, logprobs=0)
    prompts = tiny.prompts((5, 19))
    core.add(Request("short", tuple(prompts[0]), params))
    core.add(Request("chunks", tuple(prompts[1]), params))
    tokens: dict[tuple[str, int], list[int]] = {}
    logprobs: list[float] = []
    for round in range(2):
        while core.has_work:
            for delta in core.step():
                assert delta.error is None, delta.error
                tokens.setdefault((delta.request_id, delta.index), []).extend(delta.token_ids)
                logprobs += [entry.logprobs[0] for entry in delta.logprobs]
        if not round:
            core.add(Request("again", tuple(prompts[1]), replace(params, temperature=1.0, top_k=1, n=2)))
    assert core.stats().prefix_hits >= 16
    return tokens, logprobs


def test_blocks_are_small_and_their_parts_aligned():
    for kv_dtype in ("int8", "float8_e4m3fn"):
        for head_size in (64, 96, 128):
            spec, full = (KVSpec(8, head_size, dtype) for dtype in (kv_dtype, "bfloat16"))
            assert spec.bytes_per_token == full.bytes_per_token * (head_size + 4) / (2 * head_size)
            for block_size in (8, 16, 32):
                key_cache, _ = KVPool.allocate([spec], 2, block_size, torch.device("cpu")).caches[0]
                assert all(stride % 16 == 0 for stride in key_cache.stride()[:2])


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_the_pool_has_room_for_the_scales(dtype):
    spec = KVSpec(2, 64, dtype)
    assert spec.bytes_per_token == 2 * 2 * (64 + 4)
    pool = KVPool.allocate([spec], 3, 16, torch.device("cpu"))
    (key_cache, _) = pool.caches[0]
    assert (key_cache.shape, key_cache.dtype) == ((3, 2, 16, 68), getattr(torch, dtype))


def test_impossible_types_are_refused():
    with pytest.raises(ConfigError, match=r"kv_cache_dtype must be one of auto, .*, int8, fp8, fp8_e4m3, got 'fp4'"):
        EngineConfig(kv_cache_dtype="fp4")
    cpu = torch.device("cpu")
    native, ref = (ops.select(cpu, torch.float32, kernels) for kernels in (None, "ref"))
    with pytest.raises(ConfigError, match="native CPU kernels have no kv_cache_dtype fp8: use int8"):
        pick_kv_dtype("fp8", torch.float32, native)
    for name in ("fp8", "fp8_e4m3"):
        assert pick_kv_dtype(name, torch.bfloat16, ref) == torch.float8_e4m3fn
    assert pick_kv_dtype("auto", torch.bfloat16, native) == torch.bfloat16

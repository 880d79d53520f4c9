"""A request's logits are bit-identical whatever else is in the step and however its tokens were computed.

Log probabilities are compared as they come, without tolerance, for every family and for every number format.
"""

import importlib.util
from pathlib import Path

import pytest

from octavo.engine.build import build_engine
from octavo.engine.config import EngineConfig
from octavo.engine.core.engine import EngineCore
from octavo.engine.errors import ConfigError
from octavo.engine.params import SamplingParams
from octavo.engine.types import Request

_spec = importlib.util.spec_from_file_location("tiny", Path(__file__).parents[1] / "models" / "tiny.py")
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

PROMPTS = tiny.prompts((5, 23, 1, 40, 33, 12, 17, 17))
NEW = 20
CONDITIONS = {
    "chunks of 16": {"max_num_batched_tokens": 16, "max_num_seqs": 16},
    "chunks of 9, without overlap": {"max_num_batched_tokens": 9, "max_num_seqs": 9, "async_scheduling": False},
    "preemption": {"num_gpu_blocks_override": 14, "enable_prefix_caching": False},
    "preemption with prefix hits": {"num_gpu_blocks_override": 14},
}
SETTINGS = {
    "dtype": "float32",
    "block_size": 8,
    "max_model_len": 64,
    "max_num_seqs": 8,
    "num_gpu_blocks_override": 200,
    "batch_invariant": True,
}
FORMATS = {
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
    "fp8": {"quantization": "fp8"},
    "int8 in bfloat16, int8 KV": {"quantization": "int8", "dtype": "bfloat16", "kv_cache_dtype": "int8"},
}
Numbers = list[tuple[int, tuple[float, ...]]]


def numbers(core: EngineCore, prompts: list[list[int]], tag: str = "") -> list[Numbers]:
    """Per prompt, per generated token: its id and the log probabilities of the likeliest tokens."""
    params = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True, logprobs=3)
    for i, prompt in enumerate(prompts):
        core.add(Request(f"{tag}{i}", tuple(prompt), params))
    got: dict[str, Numbers] = {f"{tag}{i}": [] for i in range(len(prompts))}
    while core.has_work:
        for delta in core.step():
            assert delta.error is None, delta.error
            for token, logprobs in zip(delta.token_ids, delta.logprobs, strict=True):
                got[delta.request_id].append((token, tuple(logprobs.logprobs)))
    return list(got.values())


def alone(folder: Path, options: dict[str, object]) -> list[Numbers]:
    core = build_engine(EngineConfig(model=str(folder), **SETTINGS | options)).core
    try:
        return [numbers(core, [prompt], f"alone{i}-")[0] for i, prompt in enumerate(PROMPTS)]
    finally:
        core.close()


def check(folder: Path, options: dict[str, object], expected: list[Numbers]) -> None:
    engine = build_engine(EngineConfig(model=str(folder), **SETTINGS | options))
    try:
        assert engine.info.batch_invariant
        assert numbers(engine.core, PROMPTS) == expected
        assert numbers(engine.core, PROMPTS[::-1], "again")[::-1] == expected
        stats = engine.core.stats()
        assert (stats.preemptions > 0) == ("num_gpu_blocks_override" in options)
    finally:
        engine.core.close()


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def family(request, tmp_path_factory):
    folder = tiny.make(request.param, tmp_path_factory.mktemp("checkpoints"))
    return folder, alone(folder, {})


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_request_gets_the_same_bits_in_any_company(family, condition):
    folder, expected = family
    check(folder, CONDITIONS[condition], expected)


@pytest.mark.parametrize("name", FORMATS)
def test_in_every_number_format(name, tmp_path):
    folder = tiny.make("qwen3", tmp_path)
    expected = alone(folder, FORMATS[name])
    for options in CONDITIONS.values():
        check(folder, FORMATS[name] | options, expected)


def test_bodies_without_the_guarantee_refuse(tmp_path):
    folder = tiny.make("llama", tmp_path)
    with pytest.raises(ConfigError, match="batch_invariant"):
        build_engine(EngineConfig(model=str(folder), **SETTINGS | {"kernels": "ref"}))
    engine = build_engine(EngineConfig(model=str(folder), **SETTINGS | {"kernels": "ref", "batch_invariant": False}))
    assert not engine.info.batch_invariant
    engine.core.close()

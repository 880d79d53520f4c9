"""The memory plan of a GPU, without one: what KV gets, what is said where it is too little, and that it is true."""

import importlib.util
import os
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PretrainedConfig

from octavo.engine import env
from octavo.engine.build import build_engine
from octavo.engine.config import EngineConfig
from octavo.engine.errors import ConfigError
from octavo.engine.layers.context import BuildContext
from octavo.engine.loader.assign import load_weights
from octavo.engine.models.registry import build_model
from octavo.engine.parallel.mesh import Mesh
from octavo.engine.quant.methods import choose_methods
from octavo.engine.runner import build, device_memory, profile
from octavo.engine.runner.memory import Change, Measured, ModelFacts, Need, check_free, plan_kv, shortage, ways_out
from octavo.kernels import ops as kernel_ops

_spec = importlib.util.spec_from_file_location("tiny", Path(__file__).parents[1] / "models" / "tiny.py")
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

GIB, MIB = 2**30, 2**20
CPU = torch.device("cpu")

# Llama-3.1-8B in bfloat16 on a card of 24 GiB: 128 KiB of KV for each token.
SMALL_CARD = Measured(24 * GIB, int(23.5 * GIB), 15 * GIB, GIB, 200 * MIB, 300 * MIB, 100 * MIB)
LLAMA = ModelFacts(
    2, 128, 8, weights=15 * GIB, floats=7 * GIB, head=GIB // 2, weight_bytes=2, float8=True, tensor_parallel_size=1
)


def need(tokens: int, token_bytes: int = 128 * 1024) -> Need:
    return Need(tokens, token_bytes, 16, is_length=True)


def test_kv_gets_what_the_utilization_leaves() -> None:
    used = 16 * GIB + 600 * MIB
    assert plan_kv(SMALL_CARD, 0.9, need(1024), ()) == int(24 * GIB * 0.9) - used
    # What others hold makes no difference, as long as the utilization is free.
    assert plan_kv(replace(SMALL_CARD, free=22 * GIB), 0.9, need(1024), ()) == int(24 * GIB * 0.9) - used


def test_too_little_free_at_the_start() -> None:
    check_free(80 * GIB, 74 * GIB, 0.92)
    with pytest.raises(ConfigError, match=re.escape("asks for 73.6 GiB of this GPU's 80.0 GiB, but only 41.0")) as why:
        check_free(80 * GIB, 41 * GIB, 0.92)
    assert "gpu_memory_utilization to 0.51" in str(why.value)
    check_free(80 * GIB, 41 * GIB, 0.51)


def test_one_message_says_what_takes_the_memory_and_what_would_fit() -> None:
    with pytest.raises(ConfigError) as why:
        plan_kv(SMALL_CARD, 0.92, need(65536), LLAMA.changes())
    message = str(why.value)
    for number in ("24.0 GiB", "512 MiB were in use", "22.1 GiB", "15.0 GiB weights", "1.0 GiB activations", "5.5 GiB"):
        assert number in message, number
    assert "of which max_model_len 65536 would take 8.0 GiB" in message
    ways = message.partition("what would fit: ")[2].rstrip(".").split("; or ")
    assert [way.partition(" ")[0] for way in ways] == [
        "max_model_len",
        "kv_cache_dtype",
        "quantization",
        "tensor_parallel_size",
    ]
    assert ways[1:] == ["kv_cache_dtype fp8", "quantization fp8", "tensor_parallel_size 2"]


def test_recorded_steps_may_be_given_up() -> None:
    wanted = need((SMALL_CARD.for_kv(0.92) + 200 * MIB) // (128 * 1024))
    assert "enforce_eager" in list(ways_out(SMALL_CARD, 0.92, wanted, ()))
    assert "enforce_eager" not in list(ways_out(replace(SMALL_CARD, graphs=0, libraries=400 * MIB), 0.92, wanted, ()))


def test_two_changes_where_one_is_not_enough() -> None:
    ways = list(ways_out(SMALL_CARD, 0.92, need(131072), replace(LLAMA, float8=False).changes()[:3]))
    assert ways[1:] == ["kv_cache_dtype int8 and quantization int8"]
    hopeless = replace(SMALL_CARD, weights=400 * GIB)
    assert "use a larger GPU or a smaller model" in shortage(hopeless, 0.92, need(1024), LLAMA.changes()[:1])


def test_every_way_out_is_one_and_none_is_left_out() -> None:
    rng = random.Random(0)
    seen = 0
    for _ in range(2000):
        total = rng.choice((8, 24, 80, 141)) * GIB
        measured = Measured(total, int(total * rng.uniform(0.9, 1)), int(total * rng.uniform(0.1, 1.5)), total // 20)
        wanted = need(rng.randrange(16, 200_000), rng.choice((8, 36, 128)) * 1024)
        changes = tuple(
            Change(kind, f"{kind} {i}", weights=rng.uniform(0.2, 1), token_bytes=rng.uniform(0.2, 1))
            for kind in "abc"
            for i in range(2)
        )
        if measured.for_kv(0.9) >= wanted.bytes:
            assert plan_kv(measured, 0.9, wanted, changes) == measured.for_kv(0.9)
            continue
        ways = list(ways_out(measured, 0.9, wanted, changes))
        seen += len(ways)
        for way in ways:
            if way.startswith("max_model_len "):
                length = int(way.split()[1])
                assert plan_kv(measured, 0.9, replace(wanted, tokens=length), ()) > 0
                with pytest.raises(ConfigError):
                    plan_kv(measured, 0.9, replace(wanted, tokens=length + 16), ())
            elif way.startswith("gpu_memory_utilization "):
                higher = float(way.split()[1])
                check_free(measured.total, measured.free, higher)
                assert plan_kv(measured, higher, wanted, ()) > 0
            else:
                assert _fits(measured, wanted, [c for c in changes if c.setting in way.split(" and ")])
        alone = {change.kind for change in changes if _fits(measured, wanted, [change])}
        named = {way[0] for way in ways if " and " not in way and way[0] in "abc"}
        assert named == alone
    assert seen > 500


def _fits(measured: Measured, wanted: Need, changes: list[Change]) -> bool:
    weights, kv = float(measured.weights), float(wanted.bytes)
    for change in changes:
        weights, kv = weights * change.weights, kv * change.token_bytes
    return measured.total * 0.9 - measured.activations - weights >= kv - 4  # roundings


def model_config(name: str, **sizes: int) -> PretrainedConfig:
    config = tiny.config(name, **sizes)
    config.architectures = [type(config).__name__.replace("Config", "ForCausalLM")]
    return config


def context(kernels: str, quantization: str = "none", dtype: torch.dtype = torch.float32) -> BuildContext:
    ops = kernel_ops.select(CPU, dtype, kernels)
    methods = choose_methods(quantization, True, None, ops)
    return BuildContext(
        Mesh(), ops, dtype, CPU, 64, linear_method=methods.linear, head_method=methods.head, table_method=methods.table
    )


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("quantization", ["none", "int8", "int4", "fp8"])
def test_weights_are_foretold(name: str, quantization: str) -> None:
    """As the Triton bodies pack them, and as changes promise."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "vocab_size": 1024}
    ctx = context("triton", quantization, torch.bfloat16)
    model = build_model(model_config(name, **sizes), ctx)
    foretold = device_memory.facts_of(model, ctx, quantization, float8=True)
    load_weights(model, tiny.model(name, **sizes).state_dict().items())
    packed = [layer.packed for layer in model.modules() if getattr(layer, "packed", None) is not None]
    actual = sum(section.nbytes for weight in packed for section in _sections(weight))
    actual += sum(parameter.nbytes for parameter in model.parameters())
    assert actual <= foretold.weights * 1.005
    assert actual >= foretold.weights * 0.93
    if quantization != "none":
        plain = context("triton", dtype=torch.bfloat16)
        whole = device_memory.facts_of(build_model(model_config(name, **sizes), plain), plain, "none", float8=True)
        for change in whole.changes():
            if change.setting == f"quantization {quantization}":
                assert actual <= whole.weights * change.weights * 1.005


def _sections(packed: object) -> list[object]:
    return list(getattr(packed, "sections", None) or [packed])


def test_of_weights_that_are_stored_quantized_nothing_is_foretold() -> None:
    ctx = context("ref")
    facts = device_memory.facts_of(build_model(model_config("llama"), ctx), ctx, "awq", float8=True)
    assert (facts.weights, facts.floats) == (0, 0)


LIMITS = profile.Limits(40, 8, 32, 8, tiny.VOCAB, takes_logits=True, hidden=None, records=True)


@pytest.mark.parametrize("kernels", ["ref", None])
def test_the_steps_that_are_measured_have_the_largest_shapes(kernels: str | None, monkeypatch) -> None:
    ctx = context(kernels) if kernels else context("cpu")
    model = build_model(model_config("llama"), ctx)
    load_weights(model, tiny.model("llama").state_dict().items())
    seen: list[tuple[int, ...]] = []
    logits = model.logits

    def spy(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(hidden.shape))
        return logits(hidden)

    monkeypatch.setattr(model, "logits", spy)
    for decode in (False, True):
        profile.run_step(model, ctx.ops, LIMITS, CPU, decode)
    assert seen == [(8, 32), (8, 32)]


@pytest.fixture
def gpu(monkeypatch) -> dict[str, int]:
    """A GPU of 1 GiB that does as it is told; `peak` is what each step takes, `driver` what is taken beside torch."""
    state = {"free": 1000 * MIB, "allocated": 0, "peak": 0, "driver": 0}
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "init", lambda: None)
    monkeypatch.setattr(cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(cuda, "reset_peak_memory_stats", lambda device=None: None)
    monkeypatch.setattr(cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(cuda, "memory_allocated", lambda device=None: state["allocated"])
    monkeypatch.setattr(cuda, "memory_reserved", lambda device=None: state["allocated"])
    monkeypatch.setattr(cuda, "max_memory_allocated", lambda device=None: state["allocated"] + state["peak"])
    free = lambda device=None: (state["free"] - state["allocated"] - state["driver"], 1024 * MIB)  # noqa: E731
    monkeypatch.setattr(cuda, "mem_get_info", free)
    return state


def engine_config(**settings: object) -> EngineConfig:
    return EngineConfig(**{"max_num_seqs": 8, "max_num_batched_tokens": 40, "max_model_len": 32} | settings)


def test_kv_is_planned_from_what_was_measured(gpu: dict[str, int]) -> None:
    ctx = replace(context("ref"), max_model_len=32)
    model = build_model(model_config("llama"), ctx)
    memory = device_memory.GpuMemory(engine_config(), CPU)
    memory.check_weights(model, ctx, "none")
    with memory.loading():
        load_weights(model, tiny.model("llama").state_dict().items())
        gpu["allocated"] = 100 * MIB
    gpu |= {"peak": 50 * MIB, "driver": 30 * MIB}
    # 9 rows of 33 tokens and 2 blocks; counts of 8 rows, half as much again while they grow.
    buffers = 9 * (33 + 2) * 4 + 8 * tiny.VOCAB * 5 * 3 // 2
    assert memory.for_kv(model, ctx) == int(1024 * MIB * 0.92) - 180 * MIB - buffers
    assert memory.measured is not None
    assert (memory.measured.weights, memory.measured.used) == (100 * MIB, 180 * MIB + buffers)


def test_no_room_for_a_step_or_for_weights(gpu: dict[str, int], monkeypatch) -> None:
    ctx = replace(context("ref"), max_model_len=32)
    model = build_model(model_config("llama"), ctx)
    memory = device_memory.GpuMemory(engine_config(), CPU)
    with (
        pytest.raises(ConfigError, match=r"weights have no room on the GPU: of 1\.0 GiB, 24 MiB were held"),
        memory.loading(),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
    memory.check_weights(model, ctx, "none")

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(profile, "run_step", full)
    with pytest.raises(ConfigError, match=r"A step of 40 tokens has no room on the GPU: of 1\.0 GiB, 24 MiB were held"):
        memory.for_kv(model, ctx)


def test_too_large_a_model_is_refused_before_its_weights_load(gpu: dict[str, int]) -> None:
    ctx = context("triton", dtype=torch.bfloat16)  # which keeps nothing before weights come
    sizes = {"hidden_size": 8192, "intermediate_size": 16384, "num_hidden_layers": 4, "num_attention_heads": 64}
    model = build_model(model_config("llama", **sizes), ctx)
    memory = device_memory.GpuMemory(engine_config(), CPU)
    with pytest.raises(ConfigError, match=r"too much, before any KV.*what would fit: .*tensor_parallel_size 8"):
        memory.check_weights(model, ctx, "none")


def test_an_engine_gets_the_blocks_that_were_planned(gpu: dict[str, int], tmp_path: Path, monkeypatch) -> None:
    """The whole start, on a GPU whose numbers are made up: the CPU computes."""
    monkeypatch.setattr(build, "memory_of", lambda config, device, _: device_memory.GpuMemory(config, device))
    gpu["peak"] = 900 * MIB
    config = engine_config(model=str(tiny.make("llama", tmp_path)), dtype="float32", max_num_seqs=40, max_model_len=128)
    config = replace(config, enforce_eager=True)
    engine = build_engine(config)
    engine.core.close()
    info = engine.info
    # Of 1 GiB, 0.92 less 900 MiB for steps is 42.08 MiB; 40 sequences of 128 tokens have use for 320 blocks.
    assert (info.num_blocks, info.kv_block_bytes) == (320, 16 * 2 * 2 * 8 * 4 * 3)
    assert info.steps_bytes > 900 * MIB
    gpu["peak"] = 942 * MIB
    with pytest.raises(
        ConfigError, match=r"max_model_len 128 would take 0 MiB|would fit: .*gpu_memory_utilization 0\.93"
    ):
        build_engine(config)
    # Left open, the length becomes what there is room for.
    gpu["peak"] = 941 * MIB
    engine = build_engine(replace(config, max_model_len=None))
    engine.core.close()
    assert engine.info.max_model_len == min(tiny.MAX_LEN, engine.info.num_blocks * 16)


def test_others_hold_the_gpu(gpu: dict[str, int]) -> None:
    gpu["free"] = 400 * MIB
    with pytest.raises(ConfigError, match="only 400 MiB are free"):
        device_memory.GpuMemory(engine_config(), CPU)
    device_memory.GpuMemory(engine_config(kv_cache_memory_bytes=MIB), CPU)
    device_memory.GpuMemory(engine_config(num_gpu_blocks_override=9), CPU)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": ""}, {"PYTORCH_CUDA_ALLOC_CONF": ""}),
    ],
)
def test_torchs_allocator_is_set_up_unless_the_user_did(
    given: dict[str, str], found: dict[str, str], monkeypatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(given))
    env.prepare_gpu_allocator()
    assert os.environ == found

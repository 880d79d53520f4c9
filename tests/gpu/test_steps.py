"""Steps on the GPU: graphs and overlap change nothing, nothing is waited for, and memory is what was promised."""

import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gpu_models
import gpu_parity
import pytest
import torch
from engines import assert_same, on_gpu, outcomes, run, started

from octavo.engine.core.engine import EngineCore
from octavo.engine.errors import ConfigError
from octavo.engine.params import SamplingParams
from octavo.engine.types import Request

tiny = gpu_parity.models()
MIXED: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
    {"temperature": 1.2, "min_p": 0.05, "logprobs": 3},
    {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.4},
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make("llama", tmp_path_factory.mktemp("checkpoints"))


def requests(count: int, tokens: int, tag: str = "") -> list[Request]:
    """Rows of every kind, of different lengths."""
    prompts = tiny.prompts([3 + 7 * i % 40 for i in range(count)], seed=count)
    params = [
        SamplingParams(seed=i, max_tokens=tokens + i % 3, ignore_eos=True, **MIXED[i % len(MIXED)])
        for i in range(count)
    ]
    return [Request(f"{tag}{i}", tuple(p), wanted) for i, (p, wanted) in enumerate(zip(prompts, params, strict=True))]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"async_scheduling": True}, {"async_scheduling": False}),
        on_gpu({"enforce_eager": False}, {"enforce_eager": True}),
        on_gpu({"enforce_eager": True}, {"enforce_eager": True, "async_scheduling": False}),
        on_gpu({"max_num_seqs": 3}, {"enforce_eager": True}),  # rows come and go, so that graphs of each size are used
    ],
    ids=["overlap", "graphs", "overlap without graphs", "few rows at once"],
)
def test_how_steps_are_run_changes_nothing(
    first: dict[str, Any], second: dict[str, Any], llama: Path, device: torch.device
) -> None:
    count, tokens = (8, 30) if device.type == "cuda" else (2, 1)
    found = [run(llama, requests(count, tokens), **options) for options in (first, second)]
    assert_same(*found)


@contextmanager
def no_waits() -> Iterator[None]:
    """What makes the host wait for the device raises, in any thread."""
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")


def steps(core: EngineCore, count: int) -> int:
    tokens = 0
    for _ in range(count):
        for delta in core.step():
            assert delta.error is None, delta.error
            tokens += len(delta.token_ids)
    return tokens


@pytest.mark.parametrize("eager", [False, on_gpu(True)])
@pytest.mark.parametrize("kinds", [slice(0, 1), on_gpu(slice(1, 2)), on_gpu(slice(2, 3)), on_gpu(slice(0, 4))], ids=str)
def test_steady_steps_wait_for_nothing(kinds: slice, eager: bool, llama: Path, device: torch.device) -> None:
    rows, settling, measured = (8, 10, 20) if device.type == "cuda" else (2, 2, 2)
    chosen = MIXED[kinds]
    with started(llama, enforce_eager=eager) as engine:
        for i in range(rows):
            wanted = SamplingParams(seed=i, max_tokens=60, ignore_eos=True, **chosen[i % len(chosen)])
            engine.core.add(Request(str(i), tuple(tiny.prompts([5 + i])[0]), wanted))
        steps(engine.core, settling)
        with no_waits():
            assert steps(engine.core, measured) == rows * measured
        stats = engine.core.stats()
        assert stats.step_s > 0
        assert stats.gap_s >= 0
        for i in range(rows):
            engine.core.abort(str(i))
        while engine.core.has_work:
            engine.core.step()


def models_of_the_gpu(folder: Path) -> Path:
    """Llama 3.1 8B with few layers: a gigabyte or two."""
    return gpu_models.write(gpu_models.LLAMA | {"num_hidden_layers": 4, "vocab_size": 32000}, folder / "model")


REAL: dict[str, Any] = {"load_format": "dummy", "dtype": "bfloat16", "num_gpu_blocks_override": None}


@pytest.mark.gpu
def test_the_pool_fills_what_the_user_gives(tmp_path: Path) -> None:
    """A third of the memory is given, and after steps of the full budget no more of it is taken."""
    gc.collect()
    torch.cuda.empty_cache()
    before, total = torch.cuda.mem_get_info()
    options = {"gpu_memory_utilization": 0.33, "max_model_len": 8192, "max_num_seqs": 256}
    with started(models_of_the_gpu(tmp_path), **REAL, **options) as engine:
        params = SamplingParams(max_tokens=20, ignore_eos=True)
        outcomes(engine.core, [Request(str(i), tuple(range(3, 2003)), params) for i in range(8)])
        taken = (before - torch.cuda.mem_get_info()[0]) / total
    assert 0.28 <= taken <= 0.35


@pytest.mark.gpu
def test_a_model_that_does_not_fit_is_refused_with_numbers(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"\d+(\.\d+)? (MiB|GiB|GB)") as refused,
        started(models_of_the_gpu(tmp_path), **REAL, gpu_memory_utilization=0.01, max_model_len=8192),
    ):
        pass
    assert re.search("gpu_memory_utilization|kv_cache_memory_bytes|max_model_len|quantization", str(refused.value))


@pytest.mark.gpu
def test_memory_does_not_grow_with_the_steps(tmp_path: Path) -> None:
    """Prompts and outputs of all lengths, over and over: what the allocator holds is what it held after the first."""
    with started(
        models_of_the_gpu(tmp_path), **REAL, gpu_memory_utilization=0.5, max_model_len=4096, max_num_seqs=64
    ) as engine:
        generator = torch.Generator().manual_seed(0)
        held: list[int] = []
        for turn in range(4):
            lengths = torch.randint(1, 3000, (96,), generator=generator).tolist()
            params = SamplingParams(temperature=0.8, top_p=0.9, seed=1, max_tokens=20, ignore_eos=True)
            ids = [tuple(torch.randint(3, 32000, (n,), generator=generator).tolist()) for n in lengths]
            outcomes(engine.core, [Request(f"{turn}-{i}", prompt, params) for i, prompt in enumerate(ids)])
            held.append(torch.cuda.memory_reserved())
        assert held[-1] <= held[0] + (256 << 20), held

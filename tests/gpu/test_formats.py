"""Number formats of weights and KV on the GPU, beside what they are defined to be.

KV: what is stored is the same to the bit, so greedy tokens are those of `ref`. Weights: a checkpoint's are multiplied
as floats where quantization is none; as they are, x is rounded too, and log probabilities differ by what that costs.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import gpu_parity
import pytest
import torch
from engines import DEFINITION, on_gpu, run

from octavo.engine.params import SamplingParams
from octavo.engine.types import Request

tiny = gpu_parity.models()
LENGTHS = (5, 23, 40)


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


builders = load(Path(__file__).parents[1] / "quant" / "builders.py")

WRITERS: dict[str, Callable[[Path, Path], Any]] = {
    "gptq": builders.write_gptq,
    "gptq-desc-act": lambda a, b: builders.write_gptq(a, b, desc_act=True, sym=False),
    "awq": builders.write_awq,
    "w4a16": lambda a, b: builders.write_compressed_tensors(a, b, symmetric=False, actorder=True),
    "w8a8": lambda a, b: builders.write_compressed_tensors(a, b, "w8a8"),
    "ct-fp8": lambda a, b: builders.write_compressed_tensors(a, b, "fp8"),
    "fp8": builders.write_fp8,
}
ROUNDS = ("w8a8",)  # x too, in float32
EXACT, ROUNDED = 1e-4, 0.15  # in log probability, the largest of all


def requests(lengths: tuple[int, ...], tokens: int) -> list[Request]:
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, logprobs=0)
    return [Request(str(i), tuple(prompt), params) for i, prompt in enumerate(tiny.prompts(lengths))]


@pytest.mark.parametrize(
    ("family", "kv_dtype", "lengths", "tokens"),
    [
        ("llama", "int8", (5,), 2),
        *(on_gpu(family, kind, LENGTHS, 12) for family in ("llama", "qwen3", "gemma2") for kind in ("int8", "fp8")),
        on_gpu("llama", "bfloat16", LENGTHS, 12),
    ],
)
def test_kv(family: str, kv_dtype: str, lengths: tuple[int, ...], tokens: int, tmp_path: Path) -> None:
    folder = tiny.make(family, tmp_path)
    found, wanted = (
        run(folder, requests(lengths, tokens), kv_cache_dtype=kv_dtype, **options)
        for options in ({"kernels": "triton"}, DEFINITION)
    )
    for key, one in wanted.items():
        assert found[key].tokens == one.tokens, key


@pytest.mark.parametrize("form", ["gptq", *map(on_gpu, [name for name in WRITERS if name != "gptq"])])
@pytest.mark.parametrize("family", ["llama", *map(on_gpu, ("qwen2", "phi3"))])
def test_checkpoints(family: str, form: str, tmp_path: Path, device: torch.device) -> None:
    source = builders.write_float(family, tmp_path / "source")
    exact = WRITERS[form](source, tmp_path / "quantized")
    floats = builders.write_state(source, tmp_path / "floats", exact)
    prompts = tiny.prompts(LENGTHS if device.type == "cuda" else (5, 9))
    wanted = gpu_parity.reference_logprobs(floats, torch.device("cpu"), prompts, torch.float32)
    found = gpu_parity.prompt_logprobs(tmp_path / "quantized", device, prompts, dtype="float32", kernels="triton")
    _, largest = gpu_parity.errors(found, wanted)
    assert largest <= (ROUNDED if form in ROUNDS else EXACT)


@pytest.mark.parametrize("kind", ["int4", *map(on_gpu, ("int8", "fp8"))])
def test_quantized_on_load(kind: str, tmp_path: Path, device: torch.device) -> None:
    """On the GPU as `ref` has it. A head beside int4 is int8, for which both round x."""
    source = builders.write_float("llama", tmp_path / "source")
    prompts = tiny.prompts(LENGTHS if device.type == "cuda" else (5, 9))
    options = {"dtype": "float32", "quantization": kind}
    found = gpu_parity.prompt_logprobs(source, device, prompts, kernels="triton", **options)
    wanted = gpu_parity.prompt_logprobs(source, torch.device("cpu"), prompts, kernels="ref", **options)
    _, largest = gpu_parity.errors(found, wanted)
    assert largest <= (EXACT if kind == "fp8" else ROUNDED)

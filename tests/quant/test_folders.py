"""Whole quantized folders: opened, read through their config's scheme, and equal to the weights they stand for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType

from octavo.engine.loader.checkpoint import open_checkpoint
from octavo.engine.loader.gguf import GGUFCheckpoint
from octavo.engine.loader.source import ModelSource
from octavo.engine.quant.gather import matrices
from octavo.engine.quant.scheme import read_scheme
from octavo.kernels.matrix import Matrix

sys.path.insert(0, str(Path(__file__).parent))
import builders

WRITERS: dict[str, Callable[[Path, Path], builders.State]] = {
    "gptq": builders.write_gptq,
    "gptq-8-desc-act": lambda a, b: builders.write_gptq(a, b, bits=8, group_size=64, desc_act=True, sym=False),
    "gptq-v2": lambda a, b: builders.write_gptq(a, b, v2=True, sym=False, group_size=-1),
    "awq": builders.write_awq,
    "w4a16": builders.write_compressed_tensors,
    "w4a16-asymmetric": lambda a, b: builders.write_compressed_tensors(a, b, symmetric=False, actorder=True),
    "w8a16": lambda a, b: builders.write_compressed_tensors(a, b, "w8a16", group_size=-1),
    "w8a8": lambda a, b: builders.write_compressed_tensors(a, b, "w8a8"),
    "ct-fp8": lambda a, b: builders.write_compressed_tensors(a, b, "fp8"),
    "ct-fp8-block": lambda a, b: builders.write_compressed_tensors(a, b, "fp8-block"),
    "fp8": builders.write_fp8,
    "fp8-static": lambda a, b: builders.write_fp8(a, b, block=None, static=True),
}


@pytest.fixture(scope="module", params=["llama", "qwen2", "phi3", "gpt2"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return builders.write_float(request.param, tmp_path_factory.mktemp("float"))


@pytest.mark.parametrize("name", WRITERS)
def test_folder(name: str, source: Path, tmp_path: Path) -> None:
    exact = WRITERS[name](source, tmp_path / "quantized")
    checkpoint = open_checkpoint(ModelSource("folder", tmp_path / "quantized", "m", "m"))
    scheme = read_scheme(checkpoint.config)
    assert scheme is not None
    found = dict(matrices(checkpoint.tensors(), scheme))
    assert set(found) == set(exact)
    for key, weight in found.items():
        in_layer = exact[key].dim() == 2 and (".layers." in key or ".h." in key)
        assert isinstance(weight, Matrix) == in_layer
        if isinstance(weight, Matrix):
            expected = exact[key].t() if checkpoint.config.model_type == "gpt2" else exact[key]
            torch.testing.assert_close(weight.dequantize(), expected, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(weight, exact[key])


def test_gguf_of_several_types(tmp_path: Path) -> None:
    """What llama.cpp's mixes are: types by tensor, and another one where rows are not whole blocks."""
    folder = builders.write_float("llama", tmp_path / "float", hidden_size=256, intermediate_size=320, head_dim=64)
    kinds = GGMLQuantizationType
    types = {"attn_v": kinds.Q6_K, "ffn_down": kinds.Q5_K, "token_embd": kinds.Q8_0, "blk": kinds.Q4_K}
    builders.write_gguf(folder, tmp_path / "model.gguf", types)
    found = dict(GGUFCheckpoint(tmp_path / "model.gguf").tensors())
    forms = {
        key.removeprefix("model.layers.0."): (weight.bits, weight.group_size, weight.zero)
        for key, weight in found.items()
        if isinstance(weight, Matrix) and ".layers.1." not in key and ".layers.2." not in key
    }
    assert forms == {
        "model.embed_tokens.weight": (8, 32, 128),
        **{f"self_attn.{name}_proj.weight": (4, 32, 0) for name in ("q", "k", "o")},
        "self_attn.v_proj.weight": (8, 16, 32),
        "mlp.gate_proj.weight": (4, 32, 0),
        "mlp.up_proj.weight": (4, 32, 0),
        "mlp.down_proj.weight": (8, 32, 128),  # rows of 320 are not whole blocks of 256
    }
    state = builders.load_file(folder / "model.safetensors")
    for key, weight in found.items():
        values = weight.dequantize() if isinstance(weight, Matrix) else weight
        error = (values - state[key]).square().mean() / state[key].square().mean()
        assert error.sqrt() < (0.1 if isinstance(weight, Matrix) else 1e-6)

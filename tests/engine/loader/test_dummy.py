"""Random weights: in the format the config says, the same in any layout, from a config alone."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.engine import LLM
from octavo.engine.errors import ConfigError
from octavo.engine.layers.decoder import CausalLM
from octavo.engine.layers.linear import Linear
from octavo.engine.layers.weight import Layer
from octavo.engine.loader import shapes
from octavo.engine.loader.assign import load_weights
from octavo.engine.loader.checkpoint import open_checkpoint
from octavo.engine.loader.dummy import _stored_name, init_dummy
from octavo.engine.loader.source import ModelSource, resolve_model
from octavo.engine.models.registry import build_model
from octavo.engine.parallel.layout import Layout
from octavo.engine.parallel.mesh import Mesh
from octavo.engine.quant.drawn import STD
from octavo.engine.quant.gather import stored_matrices
from octavo.engine.quant.methods import choose_methods
from octavo.engine.quant.scheme import read_scheme
from octavo.kernels.matrix import Matrix

sys.path.extend(str(Path(__file__).parents[2] / folder) for folder in ("quant", "models", "engine/parallel"))
import builders
import tiny
from paged import context

WRITERS: dict[str, Callable[[Path, Path], object]] = {
    "gptq": builders.write_gptq,
    "gptq-8-desc-act": lambda a, b: builders.write_gptq(a, b, bits=8, group_size=32, desc_act=True),
    "gptq-v2-channel": lambda a, b: builders.write_gptq(a, b, v2=True, group_size=-1),
    "awq": builders.write_awq,
    "w4a16": builders.write_compressed_tensors,
    "w4a16-asymmetric": lambda a, b: builders.write_compressed_tensors(a, b, symmetric=False, actorder=True),
    "w8a16": lambda a, b: builders.write_compressed_tensors(a, b, "w8a16", group_size=-1),
    "w8a8": lambda a, b: builders.write_compressed_tensors(a, b, "w8a8"),
    "ct-fp8": lambda a, b: builders.write_compressed_tensors(a, b, "fp8"),
    "ct-fp8-block": lambda a, b: builders.write_compressed_tensors(a, b, "fp8-block"),
    "fp8-block": builders.write_fp8,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return builders.write_float("llama", tmp_path_factory.mktemp("float"))


def opened(path: Path, weights: bool = True) -> Any:
    return open_checkpoint(ModelSource("folder", path, "m", "m"), weights=weights)


def built(config: Any, mesh: Mesh | None = None) -> CausalLM:
    """Its layers keep Matrices, as a checkpoint or dummy weights come."""
    ctx, scheme = context(mesh=mesh), read_scheme(config)
    methods = choose_methods("auto", True, scheme.method if scheme else None, ctx.ops)
    ctx = replace(ctx, linear_method=methods.linear, head_method=methods.head, table_method=methods.table)
    return build_model(config, ctx)


def dummy(config: Any, seed: int = 0, mesh: Mesh | None = None) -> CausalLM:
    model = built(config, mesh)
    init_dummy(model, seed, scheme=read_scheme(config))
    return model


def packed(model: CausalLM) -> dict[str, list[Matrix]]:
    return {path: list(layer.packed) for path, layer in model.named_modules() if getattr(layer, "packed", None)}


def form(matrix: Matrix) -> tuple[object, ...]:
    """All but the scales' dtype, which is float16 or float32, as exact as a file's scales need."""
    codes = (matrix.bits, matrix.group_size, matrix.values.dtype, matrix.zero)
    return (matrix.shape, *codes, matrix.scales is None, matrix.mins is None, matrix.inputs is None)


@pytest.mark.parametrize("name", WRITERS)
def test_in_the_format_of_the_config(name: str, source: Path, tmp_path: Path) -> None:
    """What a checkpoint of that config would be loaded as, and numbers of a size that a model works with."""
    WRITERS[name](source, tmp_path / "quantized")
    checkpoint = opened(tmp_path / "quantized")
    scheme = read_scheme(checkpoint.config)
    assert scheme is not None
    real = built(checkpoint.config)
    load_weights(real, stored_matrices(checkpoint.weights(), scheme))
    (tmp_path / "quantized" / "model.safetensors").unlink()
    found = packed(dummy(opened(tmp_path / "quantized", weights=False).config))
    for path, matrices in packed(real).items():
        if not path.startswith("layers."):
            continue
        assert len(found[path]) == len(matrices)
        for mine, theirs in zip(found[path], matrices, strict=True):
            assert form(mine) == form(theirs)
            numbers = mine.dequantize()
            assert numbers.isfinite().all()
            assert 0.5 * STD < numbers.std() < 2 * STD


@pytest.mark.parametrize("name", ["gptq-8-desc-act", "awq", "w4a16-asymmetric", "w8a8", "ct-fp8", "fp8-block", None])
def test_the_same_whatever_the_mesh_and_another_for_every_seed(name: str | None, source: Path, tmp_path: Path) -> None:
    if name is not None:
        WRITERS[name](source, tmp_path / "quantized")
    config = opened(source if name is None else tmp_path / "quantized").config
    whole, again, other = (numbers(dummy(config, seed)) for seed in (5, 5, 6))
    assert all(torch.equal(whole[path], again[path]) for path in whole)
    assert not any(torch.equal(whole[path], other[path]) for path in whole)
    layout = Layout(tp=2, pp=2)
    for rank in range(layout.size):
        stage, tp_rank = layout.place(rank)
        mesh = Mesh()
        tp, pp = replace(mesh.tp, rank=tp_rank, size=2), replace(mesh.pp, rank=stage, size=2)
        model = built(config, replace(mesh, tp=tp, pp=pp))
        rules = {path: layer.expects() for path, layer in model.named_modules() if isinstance(layer, Layer)}
        init_dummy(model, 5, scheme=read_scheme(config))
        for path, mine in numbers(model).items():
            rule, at, cut = rules[path]["weight"].rule, 0, []
            for part in rule.parts:
                cut.append(whole[path].narrow(rule.axis, at + part.source, part.size))
                at += part.whole
            torch.testing.assert_close(mine, torch.cat(cut, rule.axis), rtol=1e-6, atol=1e-8)


def numbers(model: CausalLM) -> dict[str, torch.Tensor]:
    """Of every layer with a matrix, parts one after the other."""
    found = {path: torch.cat([matrix.dequantize() for matrix in all]) for path, all in packed(model).items()}
    return found | {path: weight.data for path, weight in plain(model).items()}


def plain(model: CausalLM) -> dict[str, Any]:
    named = {path: getattr(layer, "weight", None) for path, layer in model.named_modules()}
    return {path: weight for path, weight in named.items() if weight is not None and weight.dim() == 2}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "phi3"])
def test_layers_are_called_as_in_a_checkpoint(family: str) -> None:
    """So that a scheme's rules and exceptions find them."""
    reference = tiny.model(family)
    model = build_model(reference.config, context())
    for path, layer in model.named_modules():
        if isinstance(layer, Linear):
            for part in layer.expects()["weight"].rule.parts:
                assert f"{_stored_name(model.weight_names, path, part.name)}.weight" in reference.state_dict()


def test_modules_that_are_not_quantized_are_floats(source: Path, tmp_path: Path) -> None:
    builders.write_fp8(source, tmp_path / "quantized")
    path = tmp_path / "quantized" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["modules_to_not_convert"] = ["lm_head", "model.layers.0.mlp.up_proj", "re:.*k_proj"]
    path.write_text(json.dumps(config))
    found = packed(dummy(opened(tmp_path / "quantized", weights=False).config))
    kinds = {path: [matrix.bits for matrix in found[path]] for path in found if path.startswith("layers.0")}
    assert kinds == {
        "layers.0.self_attn.qkv_proj": [8, 0, 8],
        "layers.0.self_attn.o_proj": [8],
        "layers.0.mlp.gate_up_proj": [8, 0],
        "layers.0.mlp.down_proj": [8],
    }


@pytest.mark.parametrize("name", ["fp8-block", "gptq"])
def test_a_config_is_enough(name: str, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An engine of a folder that holds nothing else; prompts are token ids."""
    WRITERS[name](source, tmp_path / "quantized")
    (tmp_path / "quantized" / "model.safetensors").unlink()
    folder = str(tmp_path / "quantized")
    with pytest.raises(ConfigError, match="holds no weights"):
        LLM(folder)
    options: Any = {"load_format": "dummy", "dtype": "float32", "kv_cache_memory_bytes": 1 << 22, "max_num_seqs": 4}
    llm = LLM(folder, **options)
    try:
        assert "has no tokenizer: its tokens below 256 are taken for bytes" in caplog.text
        assert llm.info.quantization == ("fp8" if name == "fp8-block" else "gptq")
        output = llm.generate([[1, 2, 3]], llm.get_default_sampling_params().replace(max_tokens=4, ignore_eos=True))
        assert len(output[0].outputs[0].token_ids) == 4
    finally:
        llm.close()


PARAMETERS = {"llama-3.1-8b": 8_030_261_248, "llama-3.2-1b": 1_235_814_400, "qwen3-8b": 8_190_735_360}


@pytest.mark.parametrize("name", shapes.shape_folders())
def test_every_shape_is_a_model(name: str) -> None:
    source = resolve_model(name, shapes=True)
    assert (source.kind, source.name) == ("folder", name)
    config = opened(source.path, weights=False).config
    scheme = read_scheme(config)
    assert (scheme is None) == (name in PARAMETERS)
    model = build_model(config, replace(context(max_model_len=16), device=torch.device("meta")))
    layers = [layer.expects().values() for layer in model.modules() if isinstance(layer, Layer)]
    total = sum(math.prod(weight.shape) for weights in layers for weight in weights)
    (published,) = (count for start, count in PARAMETERS.items() if name.startswith(start))
    assert total == published
    if scheme is not None:
        assert scheme.format_of("model.layers.0.mlp.down_proj") is not None


def test_a_shape_needs_dummy_weights() -> None:
    with pytest.raises(
        ConfigError, match="qwen3-8b-fp8 is the shape of a model, without weights: it needs load_format"
    ):
        resolve_model("qwen3-8b-fp8")


def test_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    shutil.copytree(source, tmp_path / "qwen3-8b-fp8")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("qwen3-8b-fp8", shapes=True).path == tmp_path / "qwen3-8b-fp8"

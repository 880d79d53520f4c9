"""On a GPU a checkpoint's tensors are read to the device and converted there: nothing comes back to the host for it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType

from octavo.engine.layers.weight import Source
from octavo.engine.loader.assign import load_weights
from octavo.engine.loader.checkpoint import Checkpoint, open_checkpoint
from octavo.engine.loader.read_ahead import read_ahead
from octavo.engine.loader.source import ModelSource
from octavo.engine.models.registry import build_model
from octavo.engine.parallel.mesh import Mesh
from octavo.engine.quant.gather import stored_matrices
from octavo.engine.quant.methods import choose_methods
from octavo.engine.quant.on_load import QUANTIZERS
from octavo.engine.quant.scheme import Scheme, read_scheme
from octavo.kernels.matrix import Matrix, join
from octavo.kernels.triton.pack import pack

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("quant", "models", "engine/loader"))
import builders
from elsewhere import THERE, Elsewhere, TensorThere
from paged import context
from test_read_ahead import LateCopies

WRITERS: dict[str, Callable[[Path, Path], object]] = {
    "gptq": builders.write_gptq,
    "gptq-8-desc-act": lambda a, b: builders.write_gptq(a, b, bits=8, group_size=64, desc_act=True, sym=False),
    "awq": builders.write_awq,
    "w4a16": lambda a, b: builders.write_compressed_tensors(a, b, symmetric=False, actorder=True),
    "w8a8": lambda a, b: builders.write_compressed_tensors(a, b, "w8a8", symmetric=False),
    "ct-fp8": lambda a, b: builders.write_compressed_tensors(a, b, "fp8"),
    "fp8-block": builders.write_fp8,
    "floats": lambda a, b: builders.write_state(a, b, builders.load_file(a / "model.safetensors")),
    **{
        f"{kind}.gguf": lambda a, b, kind=kind: builders.write_gguf(a, b, GGMLQuantizationType[kind])
        for kind in ("Q8_0", "Q4_1", "Q5_1", "F16")
    },
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return builders.write_float("llama", tmp_path_factory.mktemp("float"))


def opened(path: Path) -> tuple[Checkpoint, Scheme | None]:
    checkpoint = open_checkpoint(ModelSource("gguf" if path.is_file() else "folder", path, "m", "m"))
    return checkpoint, read_scheme(checkpoint.config)


def walk(path: Path, *, there: bool) -> Iterator[tuple[str, torch.Tensor | Matrix]]:
    """Matrices but for their last outputs, read ahead."""
    checkpoint, scheme = opened(path)
    weights: Any = checkpoint.weights()
    found = weights if scheme is None else stored_matrices(weights, scheme)

    def mine(weight: Source) -> Source:
        return weight.narrow(0, 0, weight.shape[0] - 8)

    staging = LateCopies(there=True) if there else None
    with closing(read_ahead(found, lambda _, weight: [mine(weight)] if len(weight.shape) > 1 else [], staging)) as read:
        for name, weight in read:
            if len(weight.shape) > 1 and not isinstance(weight, torch.Tensor):
                yield name, mine(weight).read()


def held(value: Any) -> Any:
    """There → here, all of whose tensors must have been there."""
    assert isinstance(value, TensorThere)
    return value.held


def tensors_of(value: Any) -> dict[str, torch.Tensor]:
    parts = {field.name: getattr(value, field.name) for field in fields(value)}
    return {name: part for name, part in parts.items() if isinstance(part, torch.Tensor)}


def check(there: Any, here: Any) -> None:
    assert tensors_of(there).keys() == tensors_of(here).keys()
    for name, part in tensors_of(here).items():
        assert torch.equal(held(getattr(there, name)).float(), part.float()), name


@pytest.mark.parametrize("name", WRITERS)
def test_converted_where_it_is(name: str, source: Path, tmp_path: Path) -> None:
    """Format by format: as on the host, and then into the layouts of the GPU's ops."""
    path = tmp_path / name
    WRITERS[name](source, path)
    host = dict(walk(path, there=False))
    with Elsewhere():
        device = dict(walk(path, there=True))
        assert device.keys() == host.keys()
        for key, weight in device.items():
            if isinstance(weight, Matrix):
                here: Any = host[key]
                check(weight, here)
                check(pack(weight), pack(here))
                if here.inputs is None:  # whose order is compared on the host
                    check(pack(join([weight, weight])), pack(join([here, here])))
                check(weight.narrow(1, 4, 8), here.narrow(1, 4, 8))
            else:
                assert torch.equal(held(weight), host[key])


@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("name", ["floats", "gptq-8-desc-act", "fp8-block", "Q8_0.gguf"])
def test_a_model_loaded_through_staging_is_the_same(
    name: str, rank: int | None, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, and the slices of one rank of two."""
    WRITERS[name](source, tmp_path / name)
    mesh = Mesh() if rank is None else replace(Mesh(), tp=replace(Mesh().tp, rank=rank, size=2))
    buffers = []

    def load(through: bool) -> dict[str, list[Matrix]]:
        def staging_of(device: torch.device) -> LateCopies | None:
            buffers.append(LateCopies() if through else None)
            return buffers[-1]

        monkeypatch.setattr("octavo.engine.loader.assign.staging_of", staging_of)
        checkpoint, scheme = opened(tmp_path / name)
        ctx = context(mesh=mesh)
        methods = choose_methods("auto", True, scheme.method if scheme else "gguf", ctx.ops)
        ctx = replace(ctx, linear_method=methods.linear, head_method=methods.head, table_method=methods.table)
        model = build_model(checkpoint.config, ctx)
        weights: Any = checkpoint.weights()
        load_weights(model, weights if scheme is None else stored_matrices(weights, scheme))
        return {path: layer.packed for path, layer in model.named_modules() if getattr(layer, "packed", None)}

    want, got = load(False), load(True)
    assert want.keys() == got.keys()
    for path, matrices in want.items():
        for mine, theirs in zip(got[path], matrices, strict=True):
            assert torch.equal(mine.dequantize(), theirs.dequantize()), path
    assert buffers[1].buffers > 0


@pytest.mark.parametrize("name", QUANTIZERS)
def test_rounded_where_it_is(name: str) -> None:
    weight = torch.randn(70, 128, generator=torch.Generator().manual_seed(1))
    with Elsewhere():
        there = QUANTIZERS[name](weight.to(THERE), inputs=range(32, 96))
        check(there, QUANTIZERS[name](weight, inputs=range(32, 96)))
        check(pack(there), pack(QUANTIZERS[name](weight, inputs=range(32, 96))))

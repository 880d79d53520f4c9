"""Quantized checkpoints cut over ranks: each rank reads its slice, and all of them make what one rank makes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType

from octavo.engine.errors import ConfigError
from octavo.engine.layers.weight import as_floats, read
from octavo.engine.loader.assign import load_weights
from octavo.engine.loader.checkpoint import Checkpoint
from octavo.engine.loader.folder import open_folder
from octavo.engine.loader.gguf import GGUFCheckpoint
from octavo.engine.models.registry import build_model
from octavo.engine.parallel.layout import Layout
from octavo.engine.parallel.mesh import Mesh
from octavo.engine.quant.gather import stored_matrices
from octavo.engine.quant.methods import choose_methods
from octavo.engine.quant.scheme import read_scheme
from octavo.kernels.matrix import Matrix

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("quant", "models", "engine/parallel"))
import builders
import tiny
from paged import PagedModel, context
from ranks import on_ranks

MIXED = {"attn_v": "Q6_K", "ffn_down": "Q5_K", "blk": "Q4_K"}
Writer = Callable[[Path, Path], object]
WRITERS: dict[str, Writer] = {
    "gptq": builders.write_gptq,
    "gptq-desc-act": lambda a, b: builders.write_gptq(a, b, desc_act=True, sym=False),
    "gptq-8": lambda a, b: builders.write_gptq(a, b, bits=8, group_size=-1),
    "awq": builders.write_awq,
    "w4a16": lambda a, b: builders.write_compressed_tensors(a, b, symmetric=False),
    "w4a16-actorder": lambda a, b: builders.write_compressed_tensors(a, b, symmetric=False, actorder=True),
    "w4a16-channel": lambda a, b: builders.write_compressed_tensors(a, b, group_size=-1),
    "w8a8": lambda a, b: builders.write_compressed_tensors(a, b, "w8a8", symmetric=False),
    "w8a8-tensor": lambda a, b: builders.write_compressed_tensors(a, b, "w8a8", strategy="tensor"),
    "ct-fp8": lambda a, b: builders.write_compressed_tensors(a, b, "fp8"),
    "ct-fp8-block": lambda a, b: builders.write_compressed_tensors(a, b, "fp8-block"),
    "fp8": builders.write_fp8,
    **{
        f"{kind}.gguf": lambda a, b, kind=kind: builders.write_gguf(a, b, GGMLQuantizationType[kind])
        for kind in ("Q8_0", "Q4_0", "Q4_1", "Q5_1", "F16")
    },
    "K.gguf": lambda a, b: builders.write_gguf(
        a, b, {part: GGMLQuantizationType[kind] for part, kind in MIXED.items()}
    ),
}
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}  # whole blocks of the K-quants


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Checkpoint]:
    folder = tmp_path_factory.mktemp("checkpoints")

    @cache
    def source(family: str, wide: bool) -> Path:
        return builders.write_float(family, folder / f"{family}-{wide}", **(WIDE if wide else {}))

    @cache
    def made(family: str, name: str) -> Checkpoint:
        path = folder / f"{family}-{name}"
        WRITERS[name](source(family, name == "K.gguf"), path)
        return GGUFCheckpoint(path) if path.is_file() else open_folder(path, False)

    return made


def weights(checkpoint: Checkpoint) -> Any:
    scheme = read_scheme(checkpoint.config)
    return checkpoint.weights() if scheme is None else stored_matrices(checkpoint.weights(), scheme)


@pytest.mark.parametrize("name", WRITERS)
def test_a_slice_is_read_as_it_is_in_the_whole(name: str, checkpoint: Callable[[str, str], Checkpoint]) -> None:
    """Also where the cut falls within groups, blocks and packed words."""
    generator = torch.Generator().manual_seed(0)
    seen = 0
    for _, weight in weights(checkpoint("llama", name)):
        whole = as_floats(read(weight))
        seen += isinstance(read(weight), Matrix)
        for axis in range(whole.dim()):
            unit = 1 if axis == 0 or not isinstance(read(weight), Matrix) else 4
            places = whole.shape[axis] // unit
            for _ in range(4):
                first, last = sorted(torch.randint(places + 1, (2,), generator=generator).tolist())
                start, size = first * unit, max(unit, (last - first) * unit)
                start = min(start, whole.shape[axis] - size)
                cut = as_floats(read(weight.narrow(axis, start, size)))
                # Where a slice's zero points all agree they are subtracted first: the same but for the last bit.
                torch.testing.assert_close(cut, whole.narrow(axis, start, size), rtol=1e-6, atol=1e-7)
        if whole.dim() == 2:
            corner = as_floats(read(weight.narrow(0, 3, 7).narrow(1, 12, 8)))
            torch.testing.assert_close(corner, whole[3:10, 12:20], rtol=1e-6, atol=1e-7)
    assert seen or name == "F16.gguf"


def run(checkpoint: Checkpoint, quantization: str, mesh: Mesh) -> torch.Tensor:
    """Logits of a mixed step, from this rank's part."""
    ctx = context(mesh=mesh, kernels="cpu")
    scheme = read_scheme(checkpoint.config)
    stored = scheme.method if scheme else "gguf"
    methods = choose_methods(quantization, True, stored, ctx.ops)
    ctx = replace(ctx, linear_method=methods.linear, head_method=methods.head, table_method=methods.table)
    model = build_model(checkpoint.config, ctx)
    load_weights(model, weights(checkpoint))
    paged = PagedModel(model, tiny.prompts())
    paged.step([(0, 5), (1, 23), (2, 1)])
    return torch.cat([torch.stack(paged.logits[i]) for i in range(3)])


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    ("family", "name"),
    [
        *(("llama", name) for name in WRITERS),
        *(("gpt2", name) for name in ("gptq-desc-act", "Q8_0.gguf")),
        *(("phi3", name) for name in ("fp8", "awq", "Q8_0.gguf")),
        *(("gemma2", "w8a8"), ("qwen2", "Q4_1.gguf"), ("opt", "gptq")),
    ],
)
def test_ranks_agree_with_the_whole_model(
    family: str, name: str, size: int, checkpoint: Callable[[str, str], Checkpoint]
) -> None:
    found = checkpoint(family, name)

    def work(mesh: Mesh) -> list[torch.Tensor]:
        return [run(found, quantization, mesh) for quantization in ("none", "auto")]

    floats, kept = work(Mesh())
    for got_floats, got in on_ranks(Layout(tp=size), work):
        torch.testing.assert_close(got_floats, floats, atol=1e-4, rtol=1e-4)
        if "fp8" in name or name == "F16.gguf":
            torch.testing.assert_close(got, kept, atol=1e-4, rtol=1e-4)
        # Heads of 16 are cut within the groups that are rounded together: other roundings, none coarser.
        assert (got - kept).square().mean() < 1e-3 * kept.square().mean()


def test_groups_that_cannot_be_cut_are_named(checkpoint: Callable[[str, str], Checkpoint]) -> None:
    matrix = Matrix(torch.zeros(4, 24, dtype=torch.uint8), 4, 12, torch.ones(4, 2))
    with pytest.raises(ValueError, match="cannot be cut at inputs 6 to 18: its groups of 12 would come in parts of 6"):
        matrix.narrow(1, 6, 12)
    with pytest.raises(ConfigError):
        load_weights(
            build_model(checkpoint("llama", "gptq").config, context()),
            [("model.layers.0.mlp.down_proj.weight", torch.zeros(2, 2))],
        )

"""Every format against packers that follow the published layouts: the Matrix stands for exactly the same weight."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from octavo.engine.errors import ConfigError
from octavo.engine.quant.gather import matrices
from octavo.engine.quant.scheme import AWQ, GPTQ, Floats, Ints, Packed, Rule, Scheme, WeightFormat
from octavo.kernels.matrix import Matrix

sys.path.insert(0, str(Path(__file__).parent))
import packers

SHAPES = ((8, 32), (24, 96), (40, 160), (16, 256))
ODD = ((8, 40), (16, 72), (40, 104))  # inputs that are not whole groups


def read(form: WeightFormat, pieces: dict[str, torch.Tensor]) -> Matrix:
    """Through `matrices`, the only door."""
    found = dict(matrices([(f"m.{name}", piece) for name, piece in pieces.items()], scheme(form)))
    assert list(found) == ["m.weight"]
    weight = found["m.weight"]
    assert isinstance(weight, Matrix)
    parts = (weight.values, weight.scales, weight.mins)
    assert all(part.is_contiguous() for part in parts if part is not None)
    return weight


def scheme(form: WeightFormat) -> Scheme:
    return Scheme("gptq", (Rule(("Linear",), form),))


def assert_exact(matrix: Matrix, exact: np.ndarray) -> None:
    """Equal; with minima in float32, but for the rounding to float32 of a product and a sum."""
    assert matrix.scales is not None
    found = matrix.dequantize(torch.float32).double().numpy()
    largest = matrix.scales.double().amax(1, keepdim=True).numpy() * 2**matrix.bits
    assert (np.abs(found - exact) <= largest * 2.0**-22).all()
    if matrix.mins is None or torch.equal(matrix.scales.half().float(), matrix.scales.float()):
        np.testing.assert_array_equal(found, exact.astype(np.float32))


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq(bits: int, group_size: int, sym: bool, desc_act: bool, v2: bool) -> None:
    for shape in (*SHAPES, *ODD):
        weight = packers.random_weight(*shape)
        pieces, exact = packers.gptq(weight, bits, group_size, sym, desc_act, v2)
        matrix = read(GPTQ(bits, max(group_size, 0), desc_act, not v2), pieces)
        assert_exact(matrix, exact)
        whole = group_size == -1 or group_size >= shape[1]
        assert (matrix.inputs is None) == (not desc_act or whole)
        assert (matrix.mins is None) == sym
        if shape[1] % group_size == 0:
            assert matrix.group_size == (group_size if group_size > 0 else shape[1])
        if sym:
            assert (matrix.zero, matrix.scales.dtype) == (2 ** (bits - 1), torch.float16)


def test_gptq_zero_points_of_zero_borrow_from_their_neighbours() -> None:
    weight = np.abs(packers.random_weight(16, 64))
    weight[::3] *= -1
    pieces, exact = packers.gptq(weight, sym=False)
    assert_exact(read(GPTQ(4, 32, False, True), pieces), exact)


@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_awq(group_size: int, zero_point: bool) -> None:
    for shape in (*SHAPES, *ODD):
        pieces, exact = packers.awq(packers.random_weight(*shape), group_size, zero_point)
        matrix = read(AWQ(max(group_size, 0), zero_point), pieces)
        assert_exact(matrix, exact)
        assert (matrix.bits, matrix.inputs) == (4, None)
        assert zero_point or matrix.zero == 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("actorder", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 128), (4, -1), (8, 64), (8, -1)])
def test_compressed_packed(bits: int, group_size: int, symmetric: bool, actorder: bool, dtype: torch.dtype) -> None:
    for shape in (*SHAPES, *ODD, (13, 37), (3, 70)):
        weight = packers.random_weight(*shape)
        pieces, exact = packers.compressed_packed(weight, bits, group_size, symmetric, actorder, dtype)
        matrix = read(Packed(bits, max(group_size, 0), not symmetric, actorder), pieces)
        assert_exact(matrix, exact)
        if symmetric:
            assert matrix.scales.dtype == (torch.float16 if dtype == torch.float16 else torch.float32)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
def test_compressed_int8(strategy: str, symmetric: bool) -> None:
    for shape in (*SHAPES, *ODD, (5, 7)):
        pieces, exact = packers.compressed_int8(packers.random_weight(*shape), strategy, symmetric)
        matrix = read(Ints(8, 32 if strategy == "group" else 0, not symmetric), pieces)
        assert_exact(matrix, exact)
        assert not symmetric or matrix.zero == 128


def test_four_bits_in_int8() -> None:
    values = torch.randint(-8, 8, (6, 64), dtype=torch.int8)
    scales = torch.rand(6, 2)
    matrix = read(Ints(4, 32, False), {"weight": values, "weight_scale": scales})
    assert (matrix.bits, matrix.zero) == (4, 8)
    assert torch.equal(matrix.dequantize(), values.float() * scales.repeat_interleave(32, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("block", [None, (128, 128), (1, 32), (1, 1000), (32, 64)])
def test_fp8(block: tuple[int, int] | None, name: str, dtype: torch.dtype) -> None:
    for shape in (*SHAPES, *ODD, (300, 384), (130, 200)):
        pieces, exact = packers.fp8(packers.random_weight(*shape), block, name, dtype)
        matrix = read(Floats(block), pieces)
        assert matrix.values.dtype == torch.float8_e4m3fn
        assert_exact(matrix, exact)


def test_fp8_scale_per_output() -> None:
    values = torch.randn(6, 32).to(torch.float8_e4m3fn)
    for shape in ((6, 1), (6,)):
        scales = torch.rand(shape)
        matrix = read(Floats(None), {"weight": values, "weight_scale": scales})
        assert torch.equal(matrix.dequantize(), values.float() * scales.view(6, 1))


def modules(count: int) -> tuple[list[tuple[str, torch.Tensor]], dict[str, np.ndarray]]:
    """A checkpoint of quantized modules with biases, and tensors that are not quantized."""
    tensors: list[tuple[str, torch.Tensor]] = []
    exact = {}
    for i in range(count):
        pieces, exact[f"layers.{i}.proj.weight"] = packers.gptq(packers.random_weight(16, 64, i), desc_act=i % 2 == 0)
        tensors += [(f"layers.{i}.proj.{name}", piece) for name, piece in pieces.items()]
        tensors += [(f"layers.{i}.proj.bias", torch.full((16,), i)), (f"layers.{i}.norm.weight", torch.ones(64))]
    return [*tensors, ("embed.weight", torch.ones(3, 64)), ("layers.0.k_scale", torch.ones(1))], exact


@pytest.mark.parametrize("seed", range(5))
def test_pieces_may_come_in_any_order(seed: int) -> None:
    tensors, exact = modules(6)
    shuffled = [tensors[i] for i in np.random.default_rng(seed).permutation(len(tensors))]
    found = dict(matrices(shuffled, scheme(GPTQ(4, 32, True, True))))
    plain = {name for name, _ in tensors if name.endswith((".bias", "norm.weight", "embed.weight"))}
    assert set(found) == plain | set(exact)
    assert all(found[name] is tensor for name, tensor in tensors if name in plain)
    for name, weight in exact.items():
        assert_exact(found[name], weight)


def test_a_module_comes_as_soon_as_it_is_whole() -> None:
    tensors, _ = modules(2)
    seen: list[str] = []

    def source():
        for name, tensor in tensors:
            yield name, tensor
            seen.append(name)

    for name, _ in matrices(source(), scheme(GPTQ(4, 32, True, True))):
        if name == "layers.0.proj.weight":
            assert seen[-1] == "layers.0.proj.scales"
            break


@pytest.mark.parametrize("piece", ["qweight", "qzeros", "scales", "g_idx"])
def test_a_missing_piece_is_named(piece: str) -> None:
    tensors, _ = modules(3)
    tensors = [(name, tensor) for name, tensor in tensors if name != f"layers.1.proj.{piece}"]
    with pytest.raises(ConfigError, match=rf"lacks layers\.1\.proj\.{piece}, but holds layers\.1\.proj\."):
        list(matrices(tensors, scheme(GPTQ(4, 32, True, True))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": torch.ones(3, 16).half()}, r"m has scales of shape \(16, 3\), its weight asks for \(16, 2\)"),
        ({"qweight": torch.zeros(8, 8, dtype=torch.int32)}, "m has scales"),
        ({"qzeros": torch.zeros(2, 1, dtype=torch.int32)}, r"m has zero points of shape \(8, 2\)"),
        ({"g_idx": torch.zeros(63, dtype=torch.int32)}, r"m has groups of shape \(63,\) for its 64 inputs"),
        ({"g_idx": torch.full((64,), -1, dtype=torch.int32)}, "m has groups"),
    ],
)
def test_shapes_that_do_not_fit(change: dict[str, torch.Tensor], message: str) -> None:
    pieces, _ = packers.gptq(packers.random_weight(16, 64))
    with pytest.raises(ConfigError, match=message):
        read(GPTQ(4, 32, True, True), pieces | change)


def test_pieces_the_config_knows_nothing_of() -> None:
    pieces, _ = packers.gptq(packers.random_weight(16, 64), desc_act=True)
    with pytest.raises(ConfigError, match=r"'m\.g_idx' \(int32\), which does not go with its gptq config"):
        read(GPTQ(4, 32, False, True), pieces)
    with pytest.raises(ConfigError, match=r"'m\.qweight' \(int32\), which does not go"):
        read(Floats(None), pieces)
    with pytest.raises(ConfigError, match=r"'m\.weight' \(int8\), which does not go"):
        read(AWQ(32, True), {"weight": torch.zeros(2, 2, dtype=torch.int8)})


def test_ignored_modules_hold_no_pieces() -> None:
    pieces, _ = packers.gptq(packers.random_weight(16, 64))
    given = [("lm_head." + name, piece) for name, piece in pieces.items()]
    left = Scheme("gptq", (Rule(("Linear",), GPTQ(4, 32, False, True)),), ("lm_head",))
    with pytest.raises(ConfigError, match=r"'lm_head\.qweight', but its gptq config leaves lm_head unquantized"):
        list(matrices(given, left))


def test_unused_scales_are_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    values, scale = torch.randn(4, 32).to(torch.float8_e4m3fn), torch.tensor(0.5)
    given: list[tuple[str, Any]] = []
    for name in ("a", "b"):
        given += [(f"{name}.weight", values), (f"{name}.input_scale", scale), (f"{name}.weight_scale", scale)]
    with caplog.at_level("INFO"):
        assert [name for name, _ in matrices(given, scheme(Floats(None)))] == ["a.weight", "b.weight"]
    assert [record.message for record in caplog.records] == [
        "'a.input_scale' and its like are not used: activations get their scales token by token."
    ]


def test_config_is_a_namespace_or_a_dict() -> None:
    from octavo.engine.quant.scheme import read_scheme

    options = {"quant_method": "awq", "bits": 4, "group_size": 128}
    as_object = SimpleNamespace(to_dict=lambda: options)
    assert read_scheme(SimpleNamespace(quantization_config=as_object)) == read_scheme(
        SimpleNamespace(quantization_config=options)
    )

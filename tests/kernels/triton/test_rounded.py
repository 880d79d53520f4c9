"""Norms and gated activations that round their rows, in Triton; without a GPU in Triton's interpreter.

Without tolerance: what one launch gives is what the norm or activation gives, rounded by a launch of its own. And the
product with such rows is the product with the rows as they are.
"""

from collections.abc import Callable

import pytest
import torch

from octavo.kernels import ref, triton
from octavo.kernels.matrix import Matrix
from octavo.kernels.rounded import Rounded, Rounding
from octavo.kernels.triton.quantize_rows import quantize_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = {"int8": torch.int8, "float8": torch.float8_e4m3fn}
# (width, group size): whole rows, groups that fit into a tile, and groups of 96, for which there are two launches
SHAPES = [(64, 64), (64, 32), (576, 576), (576, 64), (960, 96), (1152, 128), (3000, 3000), (5120, 128), (8192, 8192)]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(shape, device=DEVICE).to(dtype)
    if x.dim() == 2 and len(x) > 2:
        x[0], x[1, 5], x[2, 7] = 0, float("nan"), float("inf")
    return x


def same(actual: torch.Tensor | Rounded, plain: torch.Tensor, rounding: Rounding) -> None:
    expected = quantize_rows(plain, rounding)
    assert isinstance(actual, Rounded)
    assert (actual.dtype, actual.rounding, actual.shape) == (plain.dtype, rounding, plain.shape)
    assert torch.equal(actual.values.view(torch.uint8), expected.values.view(torch.uint8))
    assert torch.equal(actual.scales.view(torch.int32), expected.scales.view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "group_size"), SHAPES, ids=str)
def test_norms(width: int, group_size: int, kind: str, dtype: torch.dtype) -> None:
    rounding, rows = Rounding(KINDS[kind], group_size), 5 if width < 3000 else 1
    x, residual, weight = randn(rows, width, dtype=dtype), randn(rows, width, dtype=dtype), randn(width, dtype=dtype)
    same(triton.rms_norm(x, weight, 1e-6, rounding), triton.rms_norm(x, weight, 1e-6), rounding)
    plain, total = triton.add_rms_norm(x.clone(), residual.clone(), weight, 1e-6)
    rounded, actual_total = triton.add_rms_norm(x.clone(), residual.clone(), weight, 1e-6, rounding)
    same(rounded, plain, rounding)
    torch.testing.assert_close(actual_total, total, rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the logistic function's is meant
@pytest.mark.parametrize("name", ["silu_and_mul", "gelu_tanh_and_mul"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "group_size"), SHAPES, ids=str)
def test_gated_activations(width: int, group_size: int, kind: str, name: str) -> None:
    rounding, op = Rounding(KINDS[kind], group_size), getattr(triton, name)
    x = 4 * randn(5 if width < 3000 else 1, 2 * width + 8, dtype=torch.bfloat16)[:, :-8]
    same(op(x, rounding), op(x), rounding)


def test_rows_that_lie_apart_and_none() -> None:
    rounding, weight = Rounding(torch.int8, 32), randn(64, dtype=torch.bfloat16)
    wide = torch.randn(7, 192, device=DEVICE).bfloat16()
    rows = wide[:, 64:128]
    same(triton.rms_norm(rows, weight, 1e-6, rounding), triton.rms_norm(rows, weight, 1e-6), rounding)
    plain, _ = triton.add_rms_norm(rows.clone(), rows.clone(), weight, 1e-6)
    before = wide.clone()
    rounded, total = triton.add_rms_norm(rows, wide[:, 128:], weight, 1e-6, rounding)
    assert torch.equal(total, wide[:, 128:])
    assert torch.equal(wide[:, :128], before[:, :128]), "x and its neighbours are left alone"
    plain, _ = triton.add_rms_norm(before[:, 64:128].clone(), before[:, 128:].clone(), weight, 1e-6)
    same(rounded, plain, rounding)
    none = rows[:0]
    for got in (
        triton.rms_norm(none, weight, 1e-6, rounding),
        triton.add_rms_norm(none, none, weight, 1e-6, rounding)[0],
        triton.silu_and_mul(wide[:0, :128], rounding),
    ):
        assert (got.shape, got.scales.shape) == ((0, 64), (0, 2))


def float8(outputs: int, inputs: int, groups: int) -> Matrix:
    scales = torch.rand(outputs, groups) * 0.01 + 0.001
    return Matrix(torch.randn(outputs, inputs).to(torch.float8_e4m3fn), 8, inputs // groups, scales)


def int8(outputs: int, inputs: int, groups: int) -> Matrix:
    codes = torch.randint(0, 256, (outputs, inputs), dtype=torch.uint8)
    return Matrix(codes, 8, inputs // groups, torch.rand(outputs, groups) * 0.01 + 0.001, None, 128)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("make", [float8, int8], ids=["float8", "int8"])
def test_products_of_rounded_rows(make: Callable[[int, int, int], Matrix], groups: int) -> None:
    """Rounded before or in `linear`: the same bits; and what `ref` makes of the same rows, to a unit of bfloat16."""
    matrix = make(40, 128, groups).to(torch.device(DEVICE))
    packed, x = triton.pack_linear([matrix]), torch.randn(5, 128, device=DEVICE).bfloat16()
    rounding = triton.rounding_of(packed, x.dtype)
    assert rounding is not None
    rounded, bias = quantize_rows(x, rounding), torch.randn(40, device=DEVICE).bfloat16()
    actual = triton.linear(rounded, packed, bias)
    assert torch.equal(actual, triton.linear(x, packed, bias))
    expected = ref.linear(rounded, (matrix,), bias)
    largest = expected.float().abs().amax(dim=1, keepdim=True)
    assert ((actual.float() - expected.float()).abs() <= 2**-7 * largest).all()
    assert triton.linear(quantize_rows(x[:0], rounding), packed).shape == (0, 40)


def test_who_asks_for_rounded_rows() -> None:
    """Weights that round x in one way; not those that take it as it is, reorder it, or want it in several ways."""

    def asked(*matrices: Matrix, dtype: torch.dtype = torch.bfloat16) -> Rounding | None:
        return triton.rounding_of(triton.pack_linear(matrices), dtype)

    int4 = Matrix(torch.zeros(8, 128, dtype=torch.uint8), 4, 32, torch.ones(8, 4), None, 8)
    floats = Matrix(torch.zeros(8, 128))
    reordered = Matrix(torch.zeros(8, 128, dtype=torch.uint8), 8, 32, torch.ones(8, 4), None, 128, torch.arange(128))
    assert asked(float8(8, 128, 1)) == Rounding(torch.float8_e4m3fn, 128)
    assert asked(float8(8, 128, 4), float8(8, 128, 4)) == Rounding(torch.float8_e4m3fn, 32)
    assert asked(int8(8, 128, 2), dtype=torch.float32) == Rounding(torch.int8, 64)
    assert asked(float8(8, 128, 1), dtype=torch.float32) is None, "it multiplies them as numbers"
    for others in ((int4,), (floats,), (reordered,), (float8(8, 128, 1), float8(8, 128, 4)), (int8(8, 128, 1), floats)):
        assert asked(*others) is None

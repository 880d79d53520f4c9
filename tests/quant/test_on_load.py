"""Weights quantized while they are loaded: how far they are from what they were."""

from __future__ import annotations

import pytest
import torch

from octavo.engine.errors import ConfigError
from octavo.engine.quant.on_load import fp8, int4, int8, quantizer
from octavo.kernels.matrix import Matrix

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 32), (7, 96), (300, 1280))


def random_weight(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Rows of very different sizes with outliers, one of zeros, one of equal numbers."""
    random = torch.Generator().manual_seed(shape[0])
    weight = torch.randn(shape, generator=random) * torch.logspace(-3, 1, shape[0]).unsqueeze(1)
    weight[torch.rand(shape, generator=random) < 0.01] *= 8
    if shape[0] > 2:
        weight[1], weight[2] = 0, 0.37
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1, 1e-4])
def test_int8_is_within_half_a_step(shape: tuple[int, int], dtype: torch.dtype, size: float) -> None:
    weight = random_weight(shape, dtype) * size
    matrix = int8(weight)
    assert (matrix.bits, matrix.zero, matrix.group_size, matrix.mins) == (8, 128, shape[1], None)
    assert int(matrix.values.min()) >= 1
    step = weight.float().abs().amax(1, keepdim=True) / 127
    half = matrix.scales.dtype == torch.float16
    assert half == (bool((step[step > 0] >= torch.finfo(torch.float16).tiny).all()))
    bound = 0.5001 + (127 * 2**-11 if half else 0)  # the largest codes of a row whose scale was rounded
    assert ((matrix.dequantize() - weight.float()).abs() <= step * bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_fp8_has_three_bits_of_mantissa(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = random_weight(shape, dtype)
    matrix = fp8(weight)
    assert (matrix.values.dtype, matrix.group_size) == (torch.float8_e4m3fn, shape[1])
    largest = weight.float().abs().amax(1, keepdim=True)
    error = (matrix.dequantize() - weight.float()).abs()
    subnormal = largest / 448 * 2**-10  # half of the smallest step
    assert (error <= torch.maximum(weight.float().abs() * 2**-4, subnormal) * 1.0001).all()
    assert torch.equal(matrix.values.float().abs().amax(1), torch.where(largest.squeeze(1) > 0, 448.0, 0.0))


def plain_min_max(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    groups = weight.float().unflatten(1, (-1, group_size))
    low, high = groups.aminmax(dim=2, keepdim=True)
    scale = ((high - low) / 15).half().float()
    low = low.half().float()
    codes = ((groups - low) / scale.where(scale > 0, 1)).round().clamp(0, 15)
    return (codes * scale + low).flatten(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_beats_plain_min_max(group_size: int, dtype: torch.dtype) -> None:
    weight = random_weight((300, 1280), dtype)
    matrix = int4(weight, group_size)
    assert (matrix.bits, matrix.group_size, matrix.zero) == (4, group_size, 0)
    assert matrix.scales.dtype == matrix.mins.dtype == torch.float16
    assert int(matrix.values.max()) == 15

    def errors(found: torch.Tensor) -> torch.Tensor:
        """Relative squared error of each row."""
        return (found - weight.float()).square().sum(1) / weight.float().square().sum(1).clamp_min(1e-30)

    ours, plain = errors(matrix.dequantize()), errors(plain_min_max(weight, group_size))
    assert ours.mean() < 0.92 * plain.mean()
    assert (ours <= plain * 1.01 + 1e-6).all()


@pytest.mark.parametrize(("group_size", "bound"), [(32, 0.074), (64, 0.086), (128, 0.097)])
def test_int4_error_of_normal_weights(group_size: int, bound: float) -> None:
    """Root mean square, relative. The finest steps 16 codes can have for normal numbers leave 0.107 without groups."""
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(3))
    error = int4(weight, group_size).dequantize() - weight
    assert (error.square().mean() / weight.square().mean()).sqrt() < bound


def test_int4_of_equal_numbers_and_of_a_far_group() -> None:
    weight = torch.cat([torch.full((1, 64), -0.3), torch.zeros(1, 64), 100 + torch.arange(64).view(1, 64) % 16])
    found = int4(weight).dequantize()
    assert torch.equal(found[1:], weight[1:])
    assert torch.equal(found[0], weight[0].half().float())


@pytest.mark.parametrize(
    ("width", "asked", "got"), [(256, 128, 128), (576, 128, 64), (96, 128, 32), (96, 64, 32), (256, 32, 32)]
)
def test_int4_takes_the_group_size_that_divides(width: int, asked: int, got: int) -> None:
    matrix = int4(torch.randn(4, width), asked)
    assert (matrix.bits, matrix.group_size) == (4, got)


def test_int4_becomes_int8_where_no_group_size_divides() -> None:
    assert int4(torch.randn(4, 40)).form == int8(torch.randn(4, 40)).form


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight((50, 128), torch.float32)
    names = ("int8", "int4", "fp8")
    whole = [quantizer(name)(weight).dequantize() for name in names]
    monkeypatch.setattr("octavo.engine.quant.on_load._CHUNK_WEIGHTS", 1000)
    for name, expected in zip(names, whole, strict=True):
        matrix = quantizer(name)(weight)
        assert isinstance(matrix, Matrix)
        assert torch.equal(matrix.dequantize(), expected)


def test_unknown_name() -> None:
    with pytest.raises(ConfigError, match="'int3' is not known; known are int8, int4, fp8"):
        quantizer("int3")

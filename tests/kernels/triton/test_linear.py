"""Linear layers in Triton; without a GPU in Triton's interpreter.

Against `ref` where x is rounded as `ref` does or stays as it is, with the tolerances of the CPU libraries: float32 2e-5
of the row's largest output, other types one unit of their bits. With float8 weights x becomes float8: against the
product of the rounded numbers, with the same tolerances; and against `ref` 4 % of the outputs' norm.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from octavo.kernels import ref
from octavo.kernels.matrix import Matrix
from octavo.kernels.ref.linear import round_rows
from octavo.kernels.rounded import Rounding
from octavo.kernels.triton.linear import embedding, linear, pack_linear
from octavo.kernels.triton.pack import Codes, Numbers, Scaled8, pack
from octavo.kernels.triton.quantize_rows import quantize_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def scales(n: int, groups: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return (torch.rand(n, groups) * 0.01 + 0.001).to(dtype)


def codes(n: int, k: int, bits: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)


def float8(n: int, k: int) -> torch.Tensor:
    return torch.randn(n, k).to(torch.float8_e4m3fn)


def in_blocks(n: int, k: int) -> Matrix:
    blocks = scales(-(-n // 128), k // 128, torch.float32)
    return Matrix(float8(n, k), 8, 128, blocks.repeat_interleave(128, dim=0)[:n])


FORMS: dict[str, Callable[[int, int], Matrix]] = {
    "float32": lambda n, k: Matrix(torch.randn(n, k) * 0.05),
    "bfloat16": lambda n, k: Matrix((torch.randn(n, k) * 0.05).bfloat16()),
    "int8 per output": lambda n, k: Matrix(codes(n, k, 8), 8, k, scales(n, 1, torch.float32), None, 128),
    "int8 in groups": lambda n, k: Matrix(codes(n, k, 8), 8, 64, scales(n, k // 64), None, 128),
    "AWQ 128": lambda n, k: Matrix(codes(n, k, 4), 4, 128, scales(n, k // 128), -7 * scales(n, k // 128)),
    "GPTQ 64": lambda n, k: Matrix(codes(n, k, 4), 4, 64, scales(n, k // 64), None, 8),
    "Q4_1": lambda n, k: Matrix(codes(n, k, 4), 4, 32, scales(n, k // 32), -7 * scales(n, k // 32)),
    "4 bits per output": lambda n, k: Matrix(codes(n, k, 4), 4, k, scales(n, 1, torch.float32), None, 7),
    "Q6_K": lambda n, k: Matrix(codes(n, k, 6), 8, 16, scales(n, k // 16, torch.float32), None, 32),
    "GPTQ of 8 bits": lambda n, k: Matrix(codes(n, k, 8), 8, 128, scales(n, k // 128), -99 * scales(n, k // 128)),
}
FLOAT8: dict[str, Callable[[int, int], Matrix]] = {
    "float8": lambda n, k: Matrix(float8(n, k), 8, k, scales(1, 1, torch.float32).expand(n, 1).contiguous()),
    "float8 per output": lambda n, k: Matrix(float8(n, k), 8, k, scales(n, 1, torch.float32)),
    "float8 in blocks": in_blocks,
    "float8 in groups": lambda n, k: Matrix(float8(n, k), 8, 32, scales(n, k // 32)),
}
ALL = FORMS | FLOAT8
SHAPES = [(1, 100, 1152), (17, 33, 128)]  # one in parts, the last of them shorter; one whole


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def exact(x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    """The product of x as it is: what `ref` computes, but for its rounding of x."""
    return x.float() @ matrix.dequantize().T


def expected_of(x: torch.Tensor, matrix: Matrix, bias: torch.Tensor | None) -> torch.Tensor:
    """`ref`'s product, of x rounded as the layout says."""
    layout = pack(matrix)
    if isinstance(layout, Scaled8) and matrix.values.dtype == torch.uint8:
        return ref.linear(x, (matrix,), bias)
    if isinstance(layout, Scaled8) and x.dtype != torch.float32:
        rounded = quantize_rows(x, Rounding(layout.values.dtype, layout.group_size))
        product = exact(rounded.numbers(), matrix)
    else:
        product = exact(x, matrix)
    return (product if bias is None else product + bias.float()).to(x.dtype)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    largest = expected.float().abs().amax(dim=1, keepdim=True)
    assert actual.dtype == expected.dtype
    assert ((actual.float() - expected.float()).abs() <= TOLERANCE[expected.dtype] * largest + 1e-30).all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("form", ALL)
def test_linear(form: str, dtype: torch.dtype) -> None:
    for rows, outputs, inputs in SHAPES if dtype == torch.bfloat16 else SHAPES[:1]:
        matrix = ALL[form](outputs, inputs).to(torch.device(DEVICE))
        x = torch.randn(rows, inputs + 8, device=DEVICE).to(dtype)[:, :inputs]
        bias = torch.randn(outputs, device=DEVICE).to(dtype) if rows == 1 else None
        close(linear(x, pack_linear([matrix]), bias), expected_of(x, matrix, bias))


@pytest.mark.parametrize("form", FLOAT8)
def test_rows_in_float8_are_near_the_definition(form: str) -> None:
    matrix = FLOAT8[form](130, 256).to(torch.device(DEVICE))
    x = torch.randn(5, 256, device=DEVICE).bfloat16()
    expected = ref.linear(x.float(), (matrix,))
    assert (linear(x, pack_linear([matrix])).float() - expected).norm() < 0.04 * expected.norm()


def test_layouts() -> None:
    """The blocks of float8 checkpoints keep one scale each; groups that no kernel takes become bfloat16."""
    blocks = pack(in_blocks(300, 256))
    assert isinstance(blocks, Scaled8)
    assert blocks.scales.shape == (3, 2)
    assert isinstance(pack(FORMS["Q6_K"](8, 64)), Codes)
    assert isinstance(pack(Matrix(codes(8, 48, 4), 4, 24, scales(8, 2))), Numbers)
    awq = FORMS["AWQ 128"](64, 256)
    for matrix in (awq, awq.split_groups(32)):  # as layers part them where x is rounded group by group
        assert pack_linear([matrix]).nbytes == awq.nbytes


@pytest.mark.parametrize("form", ["float8 per output", "int8 per output", "AWQ 128"])
def test_rows_that_are_zero_tiny_or_not_finite_keep_to_themselves(form: str) -> None:
    packed = pack_linear([ALL[form](40, 128).to(torch.device(DEVICE))])
    x = torch.randn(6, 128, device=DEVICE).bfloat16()
    x[0], x[1], x[2, 5], x[3, 63] = 0, 1e-38, float("nan"), float("inf")
    actual = linear(x, packed)
    assert (actual[0] == 0).all()
    assert (actual[1].abs() < 1e-30).all()
    assert not actual[2:4].isfinite().any()
    assert torch.equal(actual[4:], linear(torch.cat((torch.zeros_like(x[:4]), x[4:])), packed)[4:])


@pytest.mark.parametrize("inputs", [70, 300])
@pytest.mark.parametrize("form", ["float8 per output", "int8 per output"])
def test_inputs_that_do_not_fill_a_step(form: str, inputs: int) -> None:
    matrix, x = ALL[form](40, inputs).to(torch.device(DEVICE)), torch.randn(3, inputs, device=DEVICE).bfloat16()
    close(linear(x, pack_linear([matrix])), expected_of(x, matrix, None))


@pytest.mark.parametrize("form", ALL)
def test_embedding_is_the_dequantized_output(form: str) -> None:
    matrix, ids = ALL[form](150, 128).to(torch.device(DEVICE)), torch.randint(0, 150, (40,), device=DEVICE)
    for dtype in (torch.float32, torch.bfloat16):
        actual, expected = embedding(ids, pack_linear([matrix]), dtype), ref.embedding(ids, (matrix,), dtype)
        torch.testing.assert_close(actual, expected, rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=1e-7)
    assert embedding(ids[:0], pack_linear([matrix]), dtype).shape == (0, 128)


def test_sections_orders_and_no_rows() -> None:
    order = torch.randperm(128)
    parts = [replace(FORMS["Q4_1"](40, 128), inputs=order), FORMS["bfloat16"](5, 128), FLOAT8["float8"](20, 128)]
    parts = [part.to(torch.device(DEVICE)) for part in parts]
    x, bias, packed = torch.randn(3, 128, device=DEVICE), torch.randn(65, device=DEVICE), pack_linear(parts)
    close(linear(x, packed, bias), torch.cat([exact(x, part) for part in parts], dim=1) + bias)
    assert linear(x[:0], packed).shape == (0, 65)
    ids = torch.arange(7, device=DEVICE)
    actual = embedding(ids, pack_linear(parts[:1]), torch.float32)
    torch.testing.assert_close(actual, ref.embedding(ids, (parts[0],), torch.float32), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("size", [32, 48, 200])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "float8"])
def test_rounding_of_rows(size: int, dtype: torch.dtype) -> None:
    """As `ref` rounds, to the bit."""
    x = torch.randn(6, 2 * size, device=DEVICE).bfloat16()
    x[0], x[1], x[2, 5], x[3, size] = 0, 1e-38, float("nan"), float("inf")
    for group_size in (size, 2 * size):
        rounding = Rounding(dtype, group_size)
        actual, expected = quantize_rows(x, rounding), round_rows(x, rounding)
        assert torch.equal(actual.values.view(torch.uint8), expected.values.view(torch.uint8))
        assert torch.equal(actual.scales.view(torch.int32), expected.scales.view(torch.int32))

"""`linear` and `embedding` of the CPU libraries against `ref`: every form of weight × instruction set × shape.

Tolerances. Sums of K products in float32 in another order than torch's: 2e-5 of the row's largest output, for codes
too, since x is rounded alike. bfloat16 outputs: one unit of their 8 bits. And without tolerance: a row's bits do not
depend on the other rows or on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from octavo.kernels import cpu, ref
from octavo.kernels.cpu.library import runnable
from octavo.kernels.matrix import Matrix, join

SHAPES = [(1, 32, 32), (1, 70, 64), (2, 33, 96), (7, 96, 160), (13, 576, 192), (37, 65, 1536), (130, 200, 288)]


def scales(n: int, groups: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return (torch.rand(n, groups) * 0.01 + 0.001).to(dtype)


def codes(n: int, k: int, bits: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)


FORMS: dict[str, Callable[[int, int], Matrix]] = {
    "float32": lambda n, k: Matrix(torch.randn(n, k) * 0.05),
    "float16": lambda n, k: Matrix((torch.randn(n, k) * 0.05).half()),
    "bfloat16": lambda n, k: Matrix((torch.randn(n, k) * 0.05).bfloat16()),
    "float8": lambda n, k: Matrix(torch.randn(n, k).to(torch.float8_e4m3fn), 8, k, scales(n, 1, torch.float32)),
    "float8 in blocks": lambda n, k: Matrix(torch.randn(n, k).to(torch.float8_e4m3fn), 8, 32, scales(n, k // 32)),
    "8 bits per output": lambda n, k: Matrix(codes(n, k, 8), 8, k, scales(n, 1, torch.float32), None, 128),
    "4 bits per output": lambda n, k: Matrix(codes(n, k, 4), 4, k, scales(n, 1), -7 * scales(n, 1)),
    "Q8_0": lambda n, k: Matrix(codes(n, k, 8), 8, 32, scales(n, k // 32), None, 128),
    "Q4_0": lambda n, k: Matrix(codes(n, k, 4), 4, 32, scales(n, k // 32), None, 8),
    "Q4_1": lambda n, k: Matrix(codes(n, k, 4), 4, 32, scales(n, k // 32), -7 * scales(n, k // 32)),
    "Q4_K": lambda n, k: Matrix(
        codes(n, k, 4), 4, 32, scales(n, k // 32, torch.float32), -7 * scales(n, k // 32, torch.float32)
    ),
    "Q6_K": lambda n, k: Matrix(codes(n, k, 6), 8, 16, scales(n, k // 16, torch.float32), None, 32),
    "Q5_1": lambda n, k: Matrix(codes(n, k, 5), 8, 32, scales(n, k // 32), -15 * scales(n, k // 32)),
}


@pytest.fixture(params=list(runnable()) or ["none"])
def body(request: pytest.FixtureRequest) -> cpu.Body:
    loaded = cpu.load(request.param)
    assert loaded is not None
    return loaded


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def check(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = 2e-5 if expected.dtype == torch.float32 else 2**-7
    largest = expected.float().abs().amax(dim=1, keepdim=True)
    assert ((actual.float() - expected.float()).abs() <= tolerance * largest + 1e-30).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["x float32", "x bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_linear(body: cpu.Body, form: str, dtype: torch.dtype) -> None:
    for rows, outputs, inputs in SHAPES:
        matrix = FORMS[form](outputs, inputs)
        packed = body.pack_linear([matrix])
        x = torch.randn(rows, inputs + 8).to(dtype)[:, :inputs]
        bias = torch.randn(outputs).to(dtype) if rows % 2 else None
        actual = body.linear(x, packed, bias)
        check(actual, ref.linear(x, (matrix,), bias))
        one_by_one = torch.cat([body.linear(x[i : i + 1], packed, bias) for i in range(rows)])
        assert torch.equal(actual, one_by_one), "a row depends on the others"
        torch.set_num_threads(1)
        assert torch.equal(actual, body.linear(x, packed, bias)), "a row depends on the number of threads"
        torch.set_num_threads(2)


@pytest.mark.parametrize("form", ["float32", "bfloat16", "8 bits per output", "4 bits per output"])
def test_inputs_that_do_not_fill_a_step(body: cpu.Body, form: str) -> None:
    for inputs in (1, 3, 31, 77):
        matrix = FORMS[form](40, inputs)
        x = torch.randn(5, inputs)
        check(body.linear(x, body.pack_linear([matrix])), ref.linear(x, (matrix,)))


@pytest.mark.parametrize("form", FORMS)
def test_a_long_prompt_is_laid_out_in_parts(body: cpu.Body, form: str) -> None:
    matrix = FORMS[form](64, 1536)
    packed = body.pack_linear([matrix])
    x = torch.randn(700, 1536)
    actual = body.linear(x, packed)
    check(actual, ref.linear(x, (matrix,)))
    assert torch.equal(actual[650:660], body.linear(x[650:660], packed))


def test_no_rows(body: cpu.Body) -> None:
    assert body.linear(torch.randn(0, 64), body.pack_linear([FORMS["Q4_1"](32, 64)])).shape == (0, 32)


@pytest.mark.parametrize("form", ["float32", "float8", "8 bits per output", "Q4_1"])
def test_rows_that_are_zero_tiny_or_not_finite_keep_to_themselves(body: cpu.Body, form: str) -> None:
    packed = body.pack_linear([FORMS[form](64, 64)])
    x = torch.randn(6, 64)
    x[0], x[1], x[2, 5], x[3, 63] = 0, 1e-42, float("nan"), float("inf")
    actual = body.linear(x, packed)
    assert (actual[0] == 0).all()
    assert (actual[1].abs() < 1e-30).all()
    assert not actual[2].isfinite().any()
    assert not actual[3].isfinite().any()
    assert torch.equal(actual[4:], body.linear(x[4:], packed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_embedding_is_the_dequantized_output(body: cpu.Body, form: str, dtype: torch.dtype) -> None:
    matrix = FORMS[form](77, 96)
    ids = torch.randint(0, 77, (40,))
    actual, expected = body.embedding(ids, body.pack_linear([matrix]), dtype), ref.embedding(ids, (matrix,), dtype)
    torch.testing.assert_close(actual, expected, rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=1e-7)
    assert body.embedding(ids[:0], body.pack_linear([matrix]), dtype).shape == (0, 96)


def test_outputs_of_several_matrices_come_one_after_the_other(body: cpu.Body) -> None:
    parts = [FORMS["Q4_1"](64, 96), FORMS["Q6_K"](33, 96), FORMS["bfloat16"](5, 96)]
    x, bias = torch.randn(3, 96), torch.randn(102)
    actual = body.linear(x, body.pack_linear(parts), bias)
    check(actual, ref.linear(x, tuple(parts), bias))
    apart = [body.linear(x, body.pack_linear([part])) for part in parts]
    assert torch.equal(body.linear(x, body.pack_linear(parts)), torch.cat(apart, dim=1))


def test_joined_matrices_give_the_outputs_of_each(body: cpu.Body) -> None:
    parts = [FORMS["Q4_1"](n, 96) for n in (64, 33, 5)]
    x = torch.randn(3, 96)
    assert torch.equal(body.linear(x, body.pack_linear([join(parts)])), body.linear(x, body.pack_linear(parts)))


def test_reordered_inputs(body: cpu.Body) -> None:
    order = torch.randperm(96)
    parts = [replace(FORMS["Q4_1"](40, 96), inputs=order), FORMS["Q4_1"](24, 96)]
    x = torch.randn(5, 96)
    actual = body.linear(x, body.pack_linear(parts))
    check(actual, ref.linear(x, tuple(parts)))
    exact = torch.cat([x @ part.dequantize().T for part in parts], dim=1)
    assert ((actual - exact).norm() / exact.norm()) < 0.01

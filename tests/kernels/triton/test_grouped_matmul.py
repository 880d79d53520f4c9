"""Products of experts in Triton against `ref`; without a GPU in Triton's interpreter. Tolerances: linear layers'."""

import pytest
import torch

from octavo.kernels.ref import experts
from octavo.kernels.triton.grouped_matmul import grouped_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-7}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("counts", "outputs", "inputs"),
    [
        ([0, 1, 0, 0], 40, 64),
        ([3, 0, 17, 16, 1, 0], 130, 70),
        ([60, 2, 90], 33, 128),
        ([0, 0, 5], 16, 32),
    ],
    ids=["one row", "experts of no rows", "tiles of many rows", "the last alone"],
)
def test_grouped_linear(counts: list[int], outputs: int, inputs: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(sum(counts), inputs + 8, device=DEVICE).to(dtype)[:, :inputs]
    weights = (torch.randn(len(counts), outputs, inputs, device=DEVICE) * 0.05).to(dtype)
    offsets = torch.tensor([0, *counts], device=DEVICE).cumsum(0).to(torch.int32)
    actual, expected = (body(x, weights, offsets) for body in (grouped_linear, experts.grouped_linear))
    largest = expected.float().abs().amax(dim=1, keepdim=True)
    assert actual.dtype == expected.dtype
    assert ((actual.float() - expected.float()).abs() <= TOLERANCE[dtype] * largest).all()


def test_no_rows() -> None:
    offsets = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    x, weights = torch.zeros(0, 32, device=DEVICE), torch.zeros(3, 16, 32, device=DEVICE)
    assert grouped_linear(x, weights, offsets).shape == experts.grouped_linear(x, weights, offsets).shape == (0, 16)

"""Norms, rotation and activations in Triton against `ref`; without a GPU in Triton's interpreter.

Tolerances as for the CPU libraries: float32 2e-5; bfloat16 2 units of its 8 bits, since `ref` rounds where a fused body
does not; float16 likewise of its 11.
"""

import pytest
import torch

from octavo.kernels import ops, ref, triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the logistic function's is meant


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(1, 576), (5, 100), (0, 576), (40, 64), (2, 3, 128), (2, 4100)], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=["float32 weight", "bfloat16 weight"])
def test_rms_norm(dtype: torch.dtype, weight_dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = randn(*shape).to(dtype), randn(shape[-1]).to(weight_dtype)
    close(triton.rms_norm(x, weight, 1e-6), ref.rms_norm(x, weight, 1e-6))
    residual = randn(*shape).to(dtype)
    expected, total = ref.add_rms_norm(x, residual, weight, 1e-6)
    actual, actual_total = triton.add_rms_norm(x.clone(), residual.clone(), weight, 1e-6)
    close(actual, expected)
    assert torch.equal(actual_total, total)


def test_rms_norm_of_strided_rows(dtype: torch.dtype) -> None:
    fused, weight = randn(7, 960).to(dtype), randn(64).to(dtype)
    heads = fused[:, :576].view(7, 9, 64)
    close(triton.rms_norm(heads, weight, 1e-5), ref.rms_norm(heads, weight, 1e-5))
    columns = randn(64, 7).to(dtype).t()
    close(triton.rms_norm(columns, weight, 1e-5), ref.rms_norm(columns, weight, 1e-5))
    rows = fused[:, 64:128]
    close(triton.rms_norm(rows, weight, 1e-5), ref.rms_norm(rows, weight, 1e-5))
    expected, before = ref.add_rms_norm(rows, rows * 2, weight, 1e-5), fused.clone()
    for actual, wanted in zip(triton.add_rms_norm(rows, rows * 2, weight, 1e-5), expected, strict=True):
        close(actual, wanted)
    assert torch.equal(fused[:, 128:], before[:, 128:]), "its neighbours are left alone"


@pytest.mark.parametrize("name", ["silu_and_mul", "gelu_tanh_and_mul", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(1, 3072), (3, 200), (0, 64)], ids=str)
def test_activations(dtype: torch.dtype, name: str, shape: tuple[int, int]) -> None:
    x = (randn(*shape) * 4).to(dtype)
    close(getattr(triton, name)(x), getattr(ref, name)(x))
    wide = (randn(shape[0], shape[1] + 8) * 4).to(dtype)[:, :-8]
    close(getattr(triton, name)(wide), getattr(ref, name)(wide))


@pytest.mark.parametrize("name", ["silu_and_mul", "gelu_tanh_and_mul"])
def test_gated_activations_keep_their_limits(name: str) -> None:
    gate = torch.tensor([-1e4, -90.0, -88.0, 0.0, 88.0, 90.0, 1e4, float("nan"), -1e-6, 1e-6])
    x = torch.cat((gate, torch.ones(10))).unsqueeze(0).to(DEVICE)
    torch.testing.assert_close(getattr(triton, name)(x), getattr(ref, name)(x), rtol=1e-5, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize(("head_size", "rotated"), [(64, 64), (80, 80), (96, 24), (256, 64)])
@pytest.mark.parametrize("num_tokens", [0, 1, 9])
def test_rotary(dtype: torch.dtype, num_tokens: int, head_size: int, rotated: int) -> None:
    fused, positions = randn(num_tokens, 6, head_size).to(dtype), torch.randint(0, 100, (num_tokens,), device=DEVICE)
    cos_sin = randn(100, rotated)
    expected = ref.rotary(fused[:, :4].clone(), fused[:, 4:5].clone(), positions, cos_sin)
    value = fused[:, 5].clone()
    for actual, wanted in zip(triton.rotary(fused[:, :4], fused[:, 4:5], positions, cos_sin), expected, strict=True):
        close(actual, wanted)
    assert torch.equal(fused[:, 5], value)


def test_rotary_of_many_heads(dtype: torch.dtype) -> None:
    query, key = randn(3, 40, 64).to(dtype), randn(3, 33, 64).to(dtype)
    positions, cos_sin = torch.tensor([3, 0, 9], device=DEVICE), randn(10, 64)
    expected = ref.rotary(query, key, positions, cos_sin)
    for actual, wanted in zip(triton.rotary(query, key, positions, cos_sin), expected, strict=True):
        close(actual, wanted)


def test_ops_table() -> None:
    """Forced, Triton has these ops and `ref` the rest; by itself it is not chosen on a CPU."""
    chosen = dict(ops.select(torch.device(DEVICE), torch.bfloat16, force="triton").bodies)
    assert {"rms_norm", "add_rms_norm", "rotary", "silu_and_mul", "paged_attention", "write_kv"} <= {
        op for op, body in chosen.items() if body == "triton"
    }
    assert set(chosen.values()) <= {"triton", "ref"}
    assert "triton" not in dict(ops.select(torch.device("cpu"), torch.bfloat16).bodies).values()

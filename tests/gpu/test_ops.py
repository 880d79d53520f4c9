"""Every op of the table against `ref` on the GPU, at the shapes of real models; at small ones in the interpreter."""

from functools import partial

import gpu_attention
import gpu_kernels
import gpu_matmul
import numpy as np
import pytest
import torch
from engines import on_gpu
from gpu_attention import Case, Layer, attention_case, row_cases
from gpu_rows import Bench

from octavo.kernels import ref
from octavo.kernels import triton as ops
from octavo.kernels.sampling import Draws, Masks

SMALL = Layer(4, 2, 64, 64, 96, "cpu", torch.float32)
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered")


@pytest.fixture(autouse=True)
def plain() -> None:
    torch.manual_seed(0)


def small_cases() -> list[Case]:
    case = partial(attention_case, layer=SMALL)
    rows = [(1, 40), (9, 20), (1, 3)]
    return [case("mixed", rows), case("mixed", rows, torch.int8), case("whole", [(20, 20)])]


def cases() -> list[Case]:
    """Decode, prefill and mixed steps in every type of KV, and rows, many and few."""
    if not torch.cuda.is_available():
        return []
    rows = [case for tokens in (1, 7, 64, 8192) for case in row_cases(tokens, None)]
    half = Layer(dtype=torch.float16)
    wide = Layer(heads=16, kv_heads=8, head_size=256)
    narrow = Layer(heads=32, kv_heads=4, head_size=64)
    mixed = [(1, 2048)] * 15 + [(512, 3000), (64, 64)]
    others = [attention_case("mixed", mixed, layer=layer) for layer in (half, wide, narrow)]
    return [*gpu_attention.attention_cases(), *others, *rows, *row_cases(300, None, half)]


CASES = cases()


@pytest.mark.parametrize("case", small_cases(), ids=lambda case: f"{case.op} {case.shape}")
def test_small_shapes(case: Case) -> None:
    gpu_attention.check(case, getattr(ops, case.op))


@pytest.mark.gpu
@pytest.mark.parametrize("index", range(len(CASES)) or [0], ids=lambda index: CASES[index].shape if CASES else "none")
def test_attention_and_rows(index: int) -> None:
    gpu_attention.check(CASES[index], getattr(ops, CASES[index].op))


@pytest.mark.parametrize("tiny", [True, on_gpu(False)], ids=["small", "real"])
def test_what_is_left(tiny: bool, device: torch.device) -> None:
    """Norms, activations, an encoder's attention."""
    bench = Bench(device, tiny)
    gpu_kernels.other_ops(bench)
    assert bench.rows
    assert not [row.note for row in bench.rows if row.wrong]


@pytest.mark.parametrize("form", gpu_matmul.FORMS)
@pytest.mark.parametrize("rows", [3, *map(on_gpu, (1, 16, 33, 64, 257, 4096))])
def test_matmuls(form: str, rows: int, device: torch.device) -> None:
    layers = gpu_matmul.LAYERS if device.type == "cuda" else gpu_matmul.SMALL
    for outputs, inputs in layers.values():
        x = torch.randn(rows, inputs, device=device).to(gpu_matmul.dtype_on(device))
        gpu_matmul.check(x, gpu_matmul.FORMS[form](outputs, inputs, device))


@pytest.mark.parametrize("counts", [(2, 0, 1), on_gpu((700, 0, 3, 64, 129)), on_gpu((1,) * 32), on_gpu((0, 0, 9000))])
def test_experts(counts: tuple[int, ...], device: torch.device) -> None:
    outputs, inputs = (1536, 2048) if device.type == "cuda" else (64, 128)
    dtype = gpu_matmul.dtype_on(device)
    x = torch.randn(sum(counts), inputs, device=device).to(dtype)
    weights = torch.randn(len(counts), outputs, inputs, device=device).to(dtype)
    offsets = torch.tensor([0, *counts], device=device).cumsum(0).to(torch.int32)
    gpu_matmul.check_experts(x, weights, offsets)


@pytest.mark.parametrize(("rows", "vocab"), [(3, 500), on_gpu(64, 128256), on_gpu(1, 151936), on_gpu(256, 32000)])
def test_sampling(rows: int, vocab: int, device: torch.device) -> None:
    rng = np.random.default_rng(0)
    logits = torch.randn(rows, vocab, device=device) * 3
    order, ones = rng.permutation(rows), np.ones(rows)
    temperature = np.resize([0.3, 1.0, 1.7], rows)
    kept = np.resize([1, 50, vocab], rows), np.resize([0.5, 1.0, 0.95], rows), np.resize([0.0, 0.01], rows)
    gpu_kernels.check_peaks(logits)
    gpu_kernels.check_draw(logits, Draws(order, ones, np.full(rows, vocab), ones, ones * 0, rng.random(rows)))
    gpu_kernels.check_draw(logits, Draws(order, temperature, *kept, rng.random(rows)))
    gpu_kernels.check_logprobs(logits, torch.randint(0, vocab, (rows,), device=device))
    words = torch.randint(-(1 << 31), 1 << 31, (rows, -(-vocab // 32)), device=device).to(torch.int32)
    gpu_kernels.check_masks(logits, Masks(order, words))


@pytest.mark.parametrize("num_blocks", [6, on_gpu(20_000)])
def test_copied_blocks(num_blocks: int, device: torch.device) -> None:
    caches = torch.randn(2, num_blocks, 2, 16, 64, device=device)
    order = torch.randperm(num_blocks, device=device)
    pairs = torch.stack((order[: num_blocks // 2], order[num_blocks // 2 :]), dim=1)
    expected = caches.clone()
    ops.copy_blocks(caches[0], caches[1], pairs)
    ref.copy_blocks(expected[0], expected[1], pairs)
    assert torch.equal(caches, expected)

"""Our decoders against gguf's own, element by element, on random blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from octavo.engine.loader import gguf_blocks
from octavo.engine.loader.gguf_blocks import TYPES, dequantize, matrix

QUANTIZED = [number for number, kind in TYPES.items() if kind.decode is not None]
# bytes at which a block holds its float16 scales
SCALES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def random_blocks(number: int, count: int) -> np.ndarray:
    """[count, bytes] uint8: any bits but in the scales, which are finite numbers of both signs."""
    random = np.random.default_rng(number)
    kind = TYPES[number]
    blocks = random.integers(0, 256, (count, kind.size), dtype=np.uint8)
    for at in SCALES.get(kind.name, (0,)):
        blocks[:, at : at + 2] = random.normal(0, 0.1, (count, 1)).astype(np.float16).view(np.uint8)
    return blocks


@pytest.mark.parametrize("number", QUANTIZED, ids=lambda number: TYPES[number].name)
@pytest.mark.parametrize("chunk", [1 << 18, 512])
def test_equals_gguf_on_random_blocks(number: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_blocks, "_CHUNK_WEIGHTS", chunk)
    blocks = random_blocks(number, 37)
    expected = quants.dequantize(blocks, GGMLQuantizationType(number)).reshape(-1)
    found = dequantize(torch.from_numpy(blocks).view(-1), TYPES[number])
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), expected)


# name → bits, group size, zero, scales' dtype, whether there are mins
FORMS = {
    "Q4_0": (4, 32, 8, torch.float16, False),
    "Q4_1": (4, 32, 0, torch.float16, True),
    "Q5_0": (8, 32, 16, torch.float16, False),
    "Q5_1": (8, 32, 0, torch.float16, True),
    "Q8_0": (8, 32, 128, torch.float16, False),
    "Q4_K": (4, 32, 0, torch.float32, True),
    "Q5_K": (8, 32, 0, torch.float32, True),
    "Q6_K": (8, 16, 32, torch.float32, False),
}


@pytest.mark.parametrize("number", QUANTIZED, ids=lambda number: TYPES[number].name)
def test_matrices_equal_gguf(number: int) -> None:
    kind = TYPES[number]
    blocks = random_blocks(number, 21)
    expected = quants.dequantize(blocks, GGMLQuantizationType(number)).reshape(7, 3 * kind.weights)
    found = matrix(torch.from_numpy(blocks).view(-1), kind, (7, 3 * kind.weights))
    assert found.scales is not None
    form = (found.bits, found.group_size, found.zero, found.scales.dtype, found.mins is not None)
    assert form == FORMS[kind.name]
    assert int(found.values.max()) < 2 ** int(kind.name[1])
    np.testing.assert_array_equal(found.dequantize().numpy(), expected)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_numbers_survive_quantization(name: str) -> None:
    weights = np.random.default_rng(1).normal(0, 1, (8, 256)).astype(np.float32)
    packed = quants.quantize(weights, GGMLQuantizationType[name])
    kind = TYPES[GGMLQuantizationType[name]]
    found = dequantize(torch.from_numpy(packed).view(-1), kind).view(8, 256).numpy()
    bits = int(name[1])
    step = 2 * np.abs(weights).max() / (2**bits - 1)
    assert np.abs(found - weights).max() <= step


@pytest.mark.parametrize(("name", "dtype"), [("F32", np.float32), ("F16", np.float16)])
def test_plain_numbers_are_views(name: str, dtype: type) -> None:
    weights = np.random.default_rng(2).normal(0, 1, 64).astype(dtype)
    data = torch.from_numpy(weights.view(np.uint8).copy())
    found = dequantize(data, TYPES[GGMLQuantizationType[name]])
    np.testing.assert_array_equal(found.numpy(), weights)
    assert found.data_ptr() == data.data_ptr()


def test_bfloat16() -> None:
    weights = torch.randn(64).bfloat16()
    found = dequantize(weights.view(torch.uint8), TYPES[GGMLQuantizationType.BF16])
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, weights)


def test_table_agrees_with_ggml() -> None:
    from gguf import GGML_QUANT_SIZES

    for number, kind in TYPES.items():
        assert GGMLQuantizationType(number).name == kind.name
        assert GGML_QUANT_SIZES[GGMLQuantizationType(number)] == (kind.weights, kind.size)

"""What configs of quantized checkpoints say, and which are refused with which words."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from octavo.engine.errors import ConfigError
from octavo.engine.quant.scheme import AWQ, GPTQ, Floats, Ints, Packed, Scheme, read_scheme

GPTQ_CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": True}
AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
FP8_CONFIG = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "fmt": "e4m3"}
W4A16 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
W8A8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
FLOAT8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
DYNAMIC = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}


def read(config: dict[str, Any]) -> Scheme:
    found = read_scheme(SimpleNamespace(quantization_config=config))
    assert found is not None
    return found


def compressed(format: str, weights: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": more.pop("activations", None)}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    } | more


@pytest.mark.parametrize("value", [None, {}])
def test_unquantized(value: Any) -> None:
    assert read_scheme(SimpleNamespace()) is None
    assert read_scheme(SimpleNamespace(quantization_config=value)) is None


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (GPTQ_CONFIG, GPTQ(4, 128, True, True)),
        (GPTQ_CONFIG | {"bits": 8, "group_size": -1, "desc_act": False}, GPTQ(8, 0, False, True)),
        (GPTQ_CONFIG | {"checkpoint_format": "gptq_v2"}, GPTQ(4, 128, True, False)),
        (AWQ_CONFIG, AWQ(64, True)),
        (AWQ_CONFIG | {"zero_point": False, "version": "GEMM"}, AWQ(64, False)),
        (FP8_CONFIG, Floats((128, 128))),
        ({"quant_method": "fp8", "activation_scheme": "static"}, Floats(None)),
        (compressed("pack-quantized", W4A16), Packed(4, 128, False, False)),
        (compressed("pack-quantized", W4A16 | {"actorder": "group", "symmetric": False}), Packed(4, 128, True, True)),
        (compressed("pack-quantized", W4A16 | {"actorder": "weight"}), Packed(4, 128, False, False)),
        (compressed("pack-quantized", W8A8), Packed(8, 0, False, False)),
        (compressed("int-quantized", W8A8, activations=DYNAMIC), Ints(8, 0, False)),
        (compressed("naive-quantized", W8A8 | {"strategy": None}), Ints(8, 0, False)),
        (compressed("float-quantized", FLOAT8), Floats(None)),
        (compressed("naive-quantized", FLOAT8 | {"strategy": "tensor"}), Floats(None)),
        (
            compressed("float-quantized", FLOAT8 | {"strategy": "block", "block_structure": [128, 128]}),
            Floats((128, 128)),
        ),
        (compressed("float-quantized", FLOAT8 | {"strategy": "group", "group_size": 128}), Floats((1, 128))),
    ],
)
def test_formats(config: dict[str, Any], expected: object) -> None:
    assert read(config).format_of("model.layers.0.self_attn.q_proj") == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "bitsandbytes, which is not supported; supported are gptq, awq, compressed"),
        ({"bits": 4}, "no quant_method named"),
        (GPTQ_CONFIG | {"bits": 3}, "gptq quantization has bits 3; supported is 4 or 8"),
        (
            GPTQ_CONFIG | {"group_size": 48},
            "group_size 48; supported are multiples of 32, and -1",
        ),
        (GPTQ_CONFIG | {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'; supported is gptq or gptq_v2"),
        (GPTQ_CONFIG | {"dynamic": {r"+:.*mlp.*": {"bits": 8}}}, r"for the modules '\+:.*mlp.*' \(dynamic\)"),
        (AWQ_CONFIG | {"bits": 8}, "awq quantization has bits 8; supported is 4"),
        (AWQ_CONFIG | {"version": "gemv"}, "version 'gemv'; supported is gemm"),
        (FP8_CONFIG | {"fmt": "e5m2"}, "fp8 quantization has fmt 'e5m2'"),
        (FP8_CONFIG | {"weight_block_size": [128]}, r"weight_block_size \[128\]; supported are two multiples of 32"),
        (compressed("marlin-24", W4A16), r"compressed-tensors \(group_0\) quantization has format 'marlin-24'"),
        (compressed("pack-quantized", W4A16 | {"num_bits": 3}), "int weights of num_bits 3; supported is 4 or 8"),
        (compressed("pack-quantized", W8A8 | {"strategy": "tensor", "symmetric": False}), "with symmetric False"),
        (compressed("pack-quantized", FLOAT8), "float weights in format 'pack-quantized'"),
        (compressed("float-quantized", W8A8), "int weights in format 'float-quantized'"),
        (compressed("float-quantized", FLOAT8 | {"num_bits": 4}), "float weights of num_bits 4"),
        (compressed("float-quantized", FLOAT8 | {"symmetric": False}), "float weights with symmetric False"),
        (compressed("int-quantized", W8A8 | {"strategy": "block"}), "strategy 'block'"),
        (compressed("int-quantized", W8A8 | {"actorder": "group"}), "actorder in this format True"),
        (compressed("pack-quantized", W4A16, activations={"num_bits": 4}), "input_activations of num_bits 4"),
        (compressed("pack-quantized", None), r"\(group_0\) quantization has no weights"),
        (compressed("pack-quantized", W4A16, config_groups={}), "names no config_groups"),
        (compressed("pack-quantized", W4A16, sparsity_config={"format": "sparse-24-bitmask"}), "'sparse-24-bitmask'"),
        (compressed("pack-quantized", W4A16, transform_config={"config_groups": {}}), "a transform_config"),
    ],
)
def test_refusals(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(config)


def test_every_module_but_those_left_out() -> None:
    scheme = read(AWQ_CONFIG | {"modules_to_not_convert": ["lm_head", "layers.1", "self_attn.k_proj", "visual"]})
    for module in ("lm_head", "model.layers.1.mlp.up_proj", "model.layers.4.self_attn.k_proj", "visual.merger.0"):
        assert scheme.format_of(module) is None
    for module in ("model.layers.10.mlp.up_proj", "model.layers.4.self_attn.k_proj_extra", "model.visuals.proj"):
        assert scheme.format_of(module) == AWQ(64, True)


def test_lists_of_modules_left_out() -> None:
    assert read(GPTQ_CONFIG | {"modules_to_not_convert": None}).ignored == ()
    assert read(FP8_CONFIG | {"ignored_layers": ["a"], "modules_to_not_convert": ["b"]}).ignored == ("a", "b")
    gptq = read(GPTQ_CONFIG | {"dynamic": {r"-:model\.layers\.[01]\.": {}}})
    assert gptq.format_of("model.layers.1.mlp.up_proj") is None
    assert gptq.format_of("model.layers.2.mlp.up_proj") == GPTQ(4, 128, True, True)
    ignore = read(compressed("pack-quantized", W4A16, ignore=["lm_head", r"re:.*\.gate$"]))
    assert ignore.format_of("model.layers.3.mlp.gate") is None
    assert ignore.format_of("model.layers.3.mlp.gate_proj") == Packed(4, 128, False, False)


def test_groups_of_modules() -> None:
    """Whoever names a module goes before whoever means all."""
    scheme = read(
        compressed(
            "pack-quantized",
            None,
            config_groups={
                "group_0": {"targets": ["Linear"], "weights": W4A16},
                "group_1": {"targets": [r"re:.*\.down_proj$"], "weights": W8A8},
                "group_2": {
                    "targets": ["model.layers.0.self_attn.o_proj"],
                    "weights": FLOAT8,
                    "format": "float-quantized",
                },
            },
        )
    )
    assert scheme.format_of("model.layers.0.mlp.up_proj") == Packed(4, 128, False, False)
    assert scheme.format_of("model.layers.0.mlp.down_proj") == Packed(8, 0, False, False)
    assert scheme.format_of("model.layers.0.self_attn.o_proj") == Floats(None)
    assert scheme.format_of("model.layers.1.self_attn.o_proj") == Packed(4, 128, False, False)


def test_parsing_imports_no_torch() -> None:
    code = "import sys, octavo.engine.quant.scheme; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"

"""Tiny quantized checkpoint folders, made from float ones, and the exact weights they stand for.

Every writer reads a Hugging Face folder with one model.safetensors, quantizes the matrices of its layers, writes a
folder that AutoConfig opens, and returns the float32 state dict that a float folder would hold instead. Weights that
transformers keeps transposed (GPT-2) are packed as their layers multiply, [outputs, inputs], as the quantizers do.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("quant", "models", "engine/loader"))
import packers
import tiny

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

State = dict[str, torch.Tensor]
_IN_LAYERS = re.compile(r"\.(layers|h)\.\d+\..*\.weight$")
_TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
_ARCHES = {
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
    "gemma2": "GEMMA2",
    "gemma3_text": "GEMMA3",
    "phi3": "PHI3",
    "gpt2": "GPT2",
}


def sizes(name: str) -> dict[str, int]:
    """Of a case of tests/models/tiny.py: matrices hold whole groups of 32 inputs, and GGUF can express the config."""
    if name.startswith("gpt2"):
        return {"n_embd": 64}
    gemma = {"query_pre_attn_scalar": 16} if name.startswith("gemma") else {}
    return {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16} | gemma


def write_float(name: str, folder: Path, **more: int) -> Path:
    """The float checkpoint of a case of tests/models/tiny.py, in sizes that can be quantized.

    Its layers' matrices are narrower than there: they neither shrink nor blow up what goes through them, so that a
    rounding error stays about as large as it was.
    """
    model = tiny.model(name, **(sizes(name) | more))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() == 2 and _IN_LAYERS.search(path):
                parameter.mul_(3.2 / parameter.shape[1] ** 0.5)
    model.save_pretrained(folder)
    return folder


def write_state(source: Path, target: Path, state: State) -> Path:
    """A float checkpoint with the config of `source` and other weights."""
    target.mkdir(parents=True)
    (target / "config.json").write_text((source / "config.json").read_text())
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, target / "model.safetensors", _FORMAT)
    return target


def write_gptq(source: Path, target: Path, **options: Any) -> State:
    """options: of `packers.gptq`."""
    chosen = {"bits": 4, "group_size": 32, "sym": True, "desc_act": False, "v2": False} | options
    config = {name: chosen[name] for name in ("bits", "group_size", "sym", "desc_act")} | {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2" if chosen["v2"] else "gptq",
    }
    return _write(source, target, config, lambda weight: packers.gptq(weight, **chosen))


def write_awq(source: Path, target: Path, **options: Any) -> State:
    """options: of `packers.awq`."""
    chosen = {"group_size": 32, "zero_point": True} | options
    config = {"quant_method": "awq", "bits": 4, "version": "gemm", "modules_to_not_convert": ["lm_head"]} | chosen
    return _write(source, target, config, lambda weight: packers.awq(weight, **chosen))


def write_compressed_tensors(source: Path, target: Path, kind: str = "w4a16", **options: Any) -> State:
    """kind: w4a16, w8a16, w8a8 (int8), fp8, fp8-block. options: of the kind's packer."""
    weights: dict[str, Any] = {"num_bits": 4 if kind == "w4a16" else 8, "type": "int", "symmetric": True}
    inputs = None
    if kind in ("w4a16", "w8a16"):
        chosen = {"bits": weights["num_bits"], "group_size": 32, "symmetric": True, "actorder": False} | options
        size = chosen["group_size"]
        weights |= {"strategy": "channel" if size == -1 else "group", "group_size": None if size == -1 else size}
        weights |= {"symmetric": chosen["symmetric"], "actorder": "group" if chosen["actorder"] else None}
        layout, pack = "pack-quantized", lambda weight: packers.compressed_packed(weight, **chosen)
    elif kind == "w8a8":
        chosen = {"strategy": "channel", "symmetric": True} | options
        weights |= chosen
        inputs = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
        layout, pack = "int-quantized", lambda weight: packers.compressed_int8(weight, **chosen)
    else:
        block = (32, 32) if kind == "fp8-block" else None
        weights |= {"type": "float", "strategy": "block" if block else "tensor", "block_structure": block}
        inputs = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
        layout, pack = "float-quantized", lambda weight: packers.fp8(weight, **({"block": block} | options))
    config = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
    }
    return _write(source, target, config, pack)


def write_fp8(source: Path, target: Path, block: tuple[int, int] | None = (32, 32), static: bool = False) -> State:
    """static: with activation scales, which do not change the weights."""
    config = {
        "quant_method": "fp8",
        "activation_scheme": "static" if static else "dynamic",
        "ignored_layers": ["lm_head"],
    }
    config |= {"weight_block_size": list(block)} if block else {}

    def pack(weight: Any) -> packers.Packed:
        pieces, exact = packers.fp8(weight, block, "weight_scale_inv" if block else "weight_scale")
        return pieces | ({"input_scale": torch.tensor(0.1)} if static else {}), exact

    return _write(source, target, config, pack)


def write_gguf(source: Path, path: Path, types: GGMLQuantizationType | dict[str, GGMLQuantizationType]) -> None:
    """types: one for all matrices, or parts of GGUF names → their type (see `gguf_writer.write_gguf`)."""
    import gguf_writer  # tests on a GPU have no gguf
    from gguf import MODEL_ARCH
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    gguf_writer.write_gguf(path, MODEL_ARCH[_ARCHES[model.config.model_type]], model, types)


_FORMAT = {"format": "pt"}


def _write(source: Path, target: Path, quantization: dict[str, Any], pack: Callable[[Any], packers.Packed]) -> State:
    stored, exact = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if tensor.dim() != 2 or not _IN_LAYERS.search(name):
            stored[name] = exact[name] = tensor
            continue
        transposed = name.endswith(_TRANSPOSED)
        pieces, weight = pack((tensor.t() if transposed else tensor).contiguous().numpy())
        stored |= {f"{name.removesuffix('weight')}{piece}": part.contiguous() for piece, part in pieces.items()}
        whole = torch.from_numpy(weight).float()
        exact[name] = whole.t().contiguous() if transposed else whole
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": quantization}
    target.mkdir(parents=True)
    (target / "config.json").write_text(json.dumps(config))
    save_file(stored, target / "model.safetensors", _FORMAT)
    return exact

"""transformers models written to GGUF as llama.cpp's converter and quantizer write them.

The names come from gguf's own table. K-quants, which gguf reads but does not write, are packed here, plainly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quants

F32 = GGMLQuantizationType.F32


def write_gguf(
    path: Path,
    arch: MODEL_ARCH,
    model: Any,
    kind: GGMLQuantizationType | Mapping[str, GGMLQuantizationType] = F32,
) -> None:
    """What convert_hf_to_gguf.py makes of the model; matrices in `kind`, or in that of the first part of their GGUF
    name that `kind` holds ("" fits all). Where a row is not whole blocks of it, in Q8_0, as llama.cpp falls back.
    """
    config = model.config
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[arch])
    write_metadata(writer, arch, config)
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        data = as_converter_stores(arch, name, tensor, config).contiguous().numpy()
        chosen = _chosen(kind, gguf_name)
        if data.ndim == 2 and chosen != F32:
            if chosen in _K_QUANTS and data.shape[1] % 256:
                chosen = GGMLQuantizationType.Q8_0
            packed = _K_QUANTS[chosen](data) if chosen in _K_QUANTS else quants.quantize(data, chosen)
            writer.add_tensor(gguf_name, packed, raw_dtype=chosen)
        else:
            writer.add_tensor(gguf_name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _chosen(kind: GGMLQuantizationType | Mapping[str, GGMLQuantizationType], name: str) -> GGMLQuantizationType:
    return next((kind[part] for part in kind if part in name), F32) if isinstance(kind, Mapping) else kind


def as_converter_stores(arch: MODEL_ARCH, name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    if arch == MODEL_ARCH.LLAMA and (".q_proj." in name or ".k_proj." in name):
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        half = tensor.shape[0] // heads // 2
        return tensor.reshape(heads, 2, half, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
    if arch in (MODEL_ARCH.GEMMA2, MODEL_ARCH.GEMMA3) and name.endswith("norm.weight"):
        return tensor + 1
    if arch == MODEL_ARCH.GPT2 and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return tensor.t()
    return tensor


def write_metadata(writer: GGUFWriter, arch: MODEL_ARCH, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_array("tokenizer.ggml.merges", ["a b"] * 10)
    if arch == MODEL_ARCH.GPT2:
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if arch == MODEL_ARCH.GEMMA2:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    _write_rope(writer, rope, head_dim, config)


def _write_rope(writer: GGUFWriter, rope: dict[str, Any], head_dim: int, config: Any) -> None:
    from gguf import RopeScalingType

    if rope["rope_type"] == "llama3":
        divisors = []
        for i in range(head_dim // 2):
            wavelength = 2 * math.pi * rope["rope_theta"] ** (2 * i / head_dim)
            turns = 8192 / wavelength
            smooth = (turns - 1) / (4 - 1)
            divisors.append(1.0 if turns > 4 else 8.0 if turns < 1 else 1 / ((1 - smooth) / 8.0 + smooth))
        writer.add_tensor("rope_freqs.weight", np.array(divisors, dtype=np.float32))
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "longrope":
        original = config.original_max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)
        scale = config.max_position_embeddings / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
        writer.add_tensor("rope_factors_long.weight", np.array(rope["long_factor"], dtype=np.float32))
        writer.add_tensor("rope_factors_short.weight", np.array(rope["short_factor"], dtype=np.float32))


def _half_bytes(values: np.ndarray) -> np.ndarray:
    """[n] → [n, 2] uint8."""
    return values.astype(np.float16).view(np.uint8).reshape(-1, 2)


def _divide(values: np.ndarray, by: np.ndarray) -> np.ndarray:
    return np.divide(values, by, out=np.zeros(np.broadcast_shapes(values.shape, by.shape)), where=by != 0)


def _pack_4_or_5(weight: np.ndarray, bits: int) -> np.ndarray:
    """weight: [N, K] → [N, bytes], rows of Q4_K or Q5_K blocks."""
    parts = weight.reshape(-1, 8, 32).astype(np.float64)
    low, high = np.minimum(parts.min(2), 0), parts.max(2)
    steps = np.maximum(high - low, 0) / (2**bits - 1)
    d, dmin = steps.max(1).astype(np.float16) / np.float16(63), (-low).max(1).astype(np.float16) / np.float16(63)
    d, dmin = d.astype(np.float16), dmin.astype(np.float16)
    scale = np.clip(np.round(_divide(steps, d[:, None].astype(np.float64))), 0, 63).astype(np.uint8)
    minimum = np.clip(np.round(_divide(-low, dmin[:, None].astype(np.float64))), 0, 63).astype(np.uint8)
    step = scale * d[:, None].astype(np.float64)
    above = parts + (minimum * dmin[:, None].astype(np.float64))[:, :, None]
    codes = np.clip(np.round(_divide(above, step[:, :, None])), 0, 2**bits - 1).astype(np.uint8)
    sixes = np.empty((len(parts), 12), dtype=np.uint8)
    for j in range(4):
        sixes[:, j] = scale[:, j] | (scale[:, j + 4] >> 4 << 6)
        sixes[:, j + 4] = minimum[:, j] | (minimum[:, j + 4] >> 4 << 6)
        sixes[:, j + 8] = (scale[:, j + 4] & 15) | (minimum[:, j + 4] & 15) << 4
    pieces = [_half_bytes(d), _half_bytes(dmin), sixes]
    if bits == 5:
        pieces.append(sum((codes[:, i] >> 4) << i for i in range(8)).astype(np.uint8))
    pieces += [(codes[:, 2 * j] & 15) | (codes[:, 2 * j + 1] & 15) << 4 for j in range(4)]
    return np.concatenate(pieces, axis=1).reshape(len(weight), -1)


def _pack_6(weight: np.ndarray) -> np.ndarray:
    """weight: [N, K] → [N, bytes], rows of Q6_K blocks."""
    parts = weight.reshape(-1, 16, 16).astype(np.float64)
    steps = np.abs(parts).max(2) / 31
    d = (steps.max(1) / 127).astype(np.float16)
    scale = np.clip(np.round(_divide(steps, d[:, None].astype(np.float64))), 0, 127).astype(np.int8)
    step = scale * d[:, None].astype(np.float64)
    codes = (np.clip(np.round(_divide(parts, step[:, :, None])), -32, 31) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low = np.stack([(codes[:, :, i] & 15) | (codes[:, :, i + 2] & 15) << 4 for i in range(2)], axis=2)
    high = sum((codes[:, :, i] >> 4) << 2 * i for i in range(4)).astype(np.uint8)
    count = len(parts)
    pieces = [low.reshape(count, 128), high.reshape(count, 64), scale.view(np.uint8), _half_bytes(d)]
    return np.concatenate(pieces, axis=1).reshape(len(weight), -1)


_K_QUANTS = {
    GGMLQuantizationType.Q4_K: lambda weight: _pack_4_or_5(weight, 4),
    GGMLQuantizationType.Q5_K: lambda weight: _pack_4_or_5(weight, 5),
    GGMLQuantizationType.Q6_K: _pack_6,
}

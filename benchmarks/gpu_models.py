"""Models to measure without a checkpoint: configs as published, in folders; weights are dummies.

Numbers of a model that matter to its speed are its sizes and formats alone. Sources: config.json of
meta-llama/Llama-3.1-8B, Qwen/Qwen3-8B and Qwen/Qwen3-8B-FP8 on the Hugging Face hub.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from floor import ModelShape
from safetensors.torch import save_file

Config = dict[str, Any]

LLAMA: Config = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "torch_dtype": "bfloat16",
}
QWEN: Config = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "torch_dtype": "bfloat16",
}
FP8 = {
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
}
# A small model of the same kind, for seeing that all of it runs.
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 320,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write(config: Config, folder: Path) -> Path:
    """A model's folder that holds its config, and weights in name alone."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file({}, folder / "model.safetensors")
    return folder


def shape_of(config: Config, bytes_per_parameter: float = 2.0, kv_bytes: float = 2.0) -> ModelShape:
    """kv_bytes: of one number of K or V."""
    width, heads, kv_heads = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    head_size, layers = config["head_dim"], config["num_hidden_layers"]
    attention = width * head_size * (2 * heads + 2 * kv_heads)
    return ModelShape(
        layer_parameters=layers * (attention + 3 * width * config["intermediate_size"]),
        head_parameters=config["vocab_size"] * width,
        bytes_per_parameter=bytes_per_parameter,
        kv_bytes_per_token=round(2 * layers * kv_heads * head_size * kv_bytes),
        attention_width=layers * heads * head_size,
    )


def tensors(config: Config) -> dict[str, torch.Tensor]:
    """A checkpoint of a Llama, random, in bfloat16."""
    width, ffn, head_size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"] * head_size, config["num_key_value_heads"] * head_size
    shapes = {"model.embed_tokens": (config["vocab_size"], width), "lm_head": (config["vocab_size"], width)}
    norms = ["model.norm"]
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        shapes |= {f"{name}.self_attn.{part}_proj": (heads if part == "q" else kv_heads, width) for part in "qkv"}
        shapes |= {f"{name}.self_attn.o_proj": (width, heads), f"{name}.mlp.down_proj": (width, ffn)}
        shapes |= {f"{name}.mlp.{part}_proj": (ffn, width) for part in ("gate", "up")}
        norms += [f"{name}.input_layernorm", f"{name}.post_attention_layernorm"]
    made = {f"{name}.weight": torch.randn(shape, dtype=torch.bfloat16) * 0.02 for name, shape in shapes.items()}
    return made | {f"{name}.weight": torch.ones(width, dtype=torch.bfloat16) for name in norms}

"""Models to measure without a checkpoint: configs as published, in folders; weights are dummies.

Numbers of a model that matter to its speed are its sizes and formats alone. Sources: config.json of
meta-llama/Llama-3.1-8B, Qwen/Qwen3-8B and Qwen/Qwen3-8B-FP8 on the Hugging Face hub.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from floor import ModelShape

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
    """A model's folder that holds its config alone."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
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

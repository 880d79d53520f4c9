"""Models to measure without a checkpoint: the shapes of configs/shapes/, whose weights are dummies. Of a model, its
sizes and formats alone matter to its speed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from floor import ModelShape

from octavo.engine.loader.shapes import shape_folders

Config = dict[str, Any]


def shape(name: str) -> Config:
    """A model of configs/shapes/."""
    found: Config = json.loads((shape_folders()[name] / "config.json").read_text())
    return found


LLAMA, LLAMA_W4A16 = shape("llama-3.1-8b"), shape("llama-3.1-8b-gptq")
QWEN, QWEN_FP8 = shape("qwen3-8b"), shape("qwen3-8b-fp8")
# A small model of the same kind, for seeing that all of it runs.
TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
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

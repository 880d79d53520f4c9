"""Tiny random checkpoints of every family, made with transformers, and what transformers generates from them.

`FAMILIES` names the cases; `config`, `model`, `make` and `reference_greedy` turn a name into what a test needs. Weights
are spread widely enough that greedy tokens vary and attention, positions, windows and biases all show in the output.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

VOCAB = 192
MAX_LEN = 128
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LEN,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 8}
GEMMA_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
GPT2 = {"vocab_size": VOCAB, "n_positions": MAX_LEN, "n_embd": 32, "n_layer": 3, "n_head": 4}
OPT = {name: SHAPE[name] for name in SHAPE if name not in ("intermediate_size", "num_key_value_heads")}
SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SCALED = {"rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1000.0, **more}}


# case → (config class, its arguments beyond SHAPE)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama-bias": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    "llama-one-kv-head": ("LlamaConfig", {"num_key_value_heads": 1, "head_dim": 16}),
    "llama-linear": ("LlamaConfig", _rope("linear", factor=3.0)),
    "llama-llama3": ("LlamaConfig", _rope("llama3", **SCALED, low_freq_factor=1.0, high_freq_factor=4.0)),
    "llama-yarn": ("LlamaConfig", _rope("yarn", **SCALED, beta_fast=4.0, beta_slow=0.5)),
    "mistral": ("MistralConfig", {"sliding_window": 8, "head_dim": 12}),
    "mistral-full": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen2-yarn": ("Qwen2Config", _rope("yarn", **SCALED, attention_factor=1.3, truncate=False)),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "qwen3-window": (
        "Qwen3Config",
        {"attention_bias": True, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    ),
    "gemma2": ("Gemma2Config", GEMMA | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0}),
    "gemma3": (
        "Gemma3TextConfig",
        GEMMA
        | {
            "layer_types": GEMMA_LAYERS,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
            },
        },
    ),
    "phi3": ("Phi3Config", {"sliding_window": 8}),
    "phi3-partial": ("Phi3Config", {"tie_word_embeddings": True, "partial_rotary_factor": 0.5}),
    "gpt2": ("GPT2Config", GPT2),
    "gpt2-scales": (
        "GPT2Config",
        GPT2 | {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False, "n_inner": 40},
    ),
    "opt": ("OPTConfig", OPT | {"ffn_dim": 48}),
    "opt-350m": ("OPTConfig", OPT | {"ffn_dim": 16, "do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "opt-plain": (
        "OPTConfig",
        OPT
        | {"ffn_dim": 48, "enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
    ),
    # Rope rules that depend on the length served: equal to transformers only at chosen lengths, so not in FAMILIES.
    "llama-dynamic": ("LlamaConfig", _rope("dynamic", factor=2.0) | {"max_position_embeddings": 32}),
    "phi3-longrope": (
        "Phi3Config",
        {
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1000.0,
                "short_factor": [1.0, 1.1, 1.3, 1.6],
                "long_factor": [1.5, 2.0, 3.0, 5.0],
            },
        },
    ),
}
LENGTH_DEPENDENT = ("llama-dynamic", "phi3-longrope")
FAMILIES = tuple(name for name in CASES if name not in LENGTH_DEPENDENT)


def config(name: str, **sizes: int) -> PretrainedConfig:
    """sizes: config fields that replace the case's."""
    kind, more = CASES[name]
    shape = SPECIAL if kind == "GPT2Config" else SHAPE if kind != "OPTConfig" else {}
    return getattr(transformers, kind)(**(shape | more | sizes))


def model(name: str, **sizes: int) -> PreTrainedModel:
    """The transformers model of a case in float32, the same weights every time. sizes: as `config` has them."""
    with torch.random.fork_rng():
        torch.manual_seed(zlib.crc32(name.encode()))
        made = transformers.AutoModelForCausalLM.from_config(config(name, **sizes), attn_implementation="eager").eval()
        gemma = "gemma" in name
        with torch.no_grad():
            for path, parameter in made.named_parameters():
                if gemma and "embed_tokens" in path:  # scaled by √M and tied, a wide one would only repeat itself
                    parameter.normal_(0, 0.06)
                elif parameter.dim() > 1:
                    parameter.normal_(0, 0.3)
                elif path.endswith("bias"):  # a wide one in the last norm would choose the same token everywhere
                    parameter.normal_(0, 0.05 if "norm" in path else 0.1)
                else:
                    parameter.normal_(0.0 if gemma else 1.0, 0.2)
    made.config.architectures = [type(made).__name__]
    return made


def make(name: str, folder: Path) -> Path:
    """Save the case as `folder`/`name`: config.json and model.safetensors, no tokenizer. Returns that folder."""
    path = Path(folder) / name
    if not path.exists():
        model(name).save_pretrained(path)
    return path


def prompts(lengths: Sequence[int] = (5, 23, 1, 40), seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def reference_greedy(source: Path | PreTrainedModel, prompts: Sequence[Sequence[int]], n: int) -> list[list[int]]:
    """The n tokens transformers generates greedily after each prompt. source: a folder of `make`, or the model."""
    if not isinstance(source, PreTrainedModel):
        source = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, attn_implementation="eager"
        )
    result = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        out = source.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n, do_sample=False
        )
        result.append(out[0, len(prompt) :].tolist())
    return result

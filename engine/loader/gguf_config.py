"""From GGUF metadata to the transformers config of the same model.

One function per architecture, in the order of the table at the end. Knows what llama.cpp's converter writes and what
llama.cpp takes for granted where it writes nothing; does not know how tensors are stored.
Source: convert_hf_to_gguf.py and src/llama-model.cpp, github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from octavo.engine.errors import ConfigError
from octavo.engine.loader.gguf_header import Metadata

if TYPE_CHECKING:
    from transformers import PretrainedConfig

T = TypeVar("T")
Fields = dict[str, Any]  # keyword arguments of a transformers config


@dataclass(frozen=True, slots=True)
class Facts:
    """What a config is made from: one file's metadata, and what its tensors tell.

    tensor_names: of the file. vocab_size: rows of the embedding. rope_factors: the values of the tensors rope_freqs,
    rope_factors_long and rope_factors_short, where the file has them.
    """

    path: Path
    arch: str
    metadata: Metadata
    tensor_names: frozenset[str]
    vocab_size: int
    rope_factors: Mapping[str, tuple[float, ...]]

    def get(self, key: str, kind: type[T], default: T | None = None) -> T | None:
        """Metadata of the architecture: `rope.freq_base` is asked for as `llama.rope.freq_base`."""
        return self.metadata.get(f"{self.arch}.{key}", kind, default)

    def require(self, key: str, kind: type[T]) -> T:
        return self.metadata.require(f"{self.arch}.{key}", kind)

    @property
    def width(self) -> int:
        return self.require("embedding_length", int)

    @property
    def num_layers(self) -> int:
        return self.require("block_count", int)

    @property
    def num_heads(self) -> int:
        return self._uniform("attention.head_count", None)

    @property
    def num_kv_heads(self) -> int:
        return self._uniform("attention.head_count_kv", self.num_heads)

    @property
    def head_size(self) -> int:
        key = self.get("attention.key_length", int, self.width // self.num_heads)
        value = self.get("attention.value_length", int, key)
        if key != value or not key:
            raise ConfigError(f"{self.path}: key heads of size {key} and value heads of size {value} must agree.")
        return key

    @property
    def tied(self) -> bool:
        return "output.weight" not in self.tensor_names

    def _uniform(self, key: str, default: int | None) -> int:
        """A number that some models give per layer."""
        if isinstance(self.get(key, object), list):
            values = set(self.require(key, list))
            if len(values) == 1 and isinstance(value := values.pop(), int):
                return value
            raise ConfigError(f"{self.path}: {self.arch}.{key} differs between layers, which is not supported.")
        return self.require(key, int) if default is None else self.get(key, int, default) or default


def make_config(facts: Facts) -> PretrainedConfig:
    """The transformers config. Raises ConfigError for an architecture or a setting that is not supported."""
    build = CONFIGS.get(facts.arch)
    if build is None:
        raise ConfigError(
            f"{facts.path}: GGUF architecture {facts.arch!r} is not supported; supported are {', '.join(CONFIGS)}."
        )
    for key in ("expert_count", "attention.scale", "embedding_scale", "residual_scale", "logit_scale"):
        if facts.get(key, float):
            raise ConfigError(f"{facts.path}: {facts.arch} models with {key} are not supported.")
    import transformers  # its import takes a second; names are found lazily in it

    metadata = facts.metadata
    tokens = {
        f"{token}_token_id": metadata.get(f"tokenizer.ggml.{key}_token_id", int)
        for token, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    try:
        name, architecture, fields = build(facts)
        common = {"architectures": [architecture], "vocab_size": facts.vocab_size, "tie_word_embeddings": facts.tied}
        return getattr(transformers, name)(**common, **tokens, **fields)
    except ConfigError:
        raise
    except Exception as error:  # transformers raises the validation errors of several libraries
        reason = " ".join(str(error).split())
        raise ConfigError(f"{facts.path}: its metadata makes no valid {facts.arch} config: {reason}") from error


def _decoder(facts: Facts) -> Fields:
    """What all but GPT-2 have."""
    return {
        "hidden_size": facts.width,
        "intermediate_size": facts.require("feed_forward_length", int),
        "num_hidden_layers": facts.num_layers,
        "num_attention_heads": facts.num_heads,
        "num_key_value_heads": facts.num_kv_heads,
        "head_dim": facts.head_size,
        "max_position_embeddings": facts.require("context_length", int),
        "rms_norm_eps": facts.require("attention.layer_norm_rms_epsilon", float),
    }


def _llama(facts: Facts) -> tuple[str, str, Fields]:
    """Llama, SmolLM2, and Mistral, which the converter calls llama too."""
    fields = {**_decoder(facts), "rope_parameters": rope_parameters(facts)}
    window = facts.get("attention.sliding_window", int)
    if window:
        return "MistralConfig", "MistralForCausalLM", {**fields, "sliding_window": window}
    fields["attention_bias"] = "blk.0.attn_q.bias" in facts.tensor_names
    fields["mlp_bias"] = "blk.0.ffn_down.bias" in facts.tensor_names
    return "LlamaConfig", "LlamaForCausalLM", fields


def _qwen2(facts: Facts) -> tuple[str, str, Fields]:
    fields = {**_decoder(facts), "rope_parameters": rope_parameters(facts)}
    if fields.pop("head_dim") != facts.width // facts.num_heads:
        raise ConfigError(f"{facts.path}: a qwen2 model whose head size is not width / heads is not supported.")
    return "Qwen2Config", "Qwen2ForCausalLM", fields


def _qwen3(facts: Facts) -> tuple[str, str, Fields]:
    fields = {**_decoder(facts), "rope_parameters": rope_parameters(facts)}
    fields["attention_bias"] = "blk.0.attn_q.bias" in facts.tensor_names
    return "Qwen3Config", "Qwen3ForCausalLM", fields


def _gemma(facts: Facts, pattern: int, layers_of_27b: int) -> Fields:
    """pattern: every so-many-th layer sees everything, the others a window. The scale of attention scores follows from
    the model's size, as in llama.cpp: 27B has another."""
    given = facts.get("attention.sliding_window_pattern", object)
    pattern = given if isinstance(given, int) and not isinstance(given, bool) else pattern
    windowed = given if isinstance(given, list) else [(i + 1) % pattern != 0 for i in range(facts.num_layers)]
    is_27b = facts.num_layers == layers_of_27b
    return {
        **_decoder(facts),
        "sliding_window": facts.require("attention.sliding_window", int),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windowed],
        "query_pre_attn_scalar": facts.width // facts.num_heads if is_27b else facts.head_size,
    }


def _gemma2(facts: Facts) -> tuple[str, str, Fields]:
    fields = {
        **_gemma(facts, pattern=2, layers_of_27b=46),
        "attn_logit_softcapping": facts.get("attn_logit_softcapping", float, 50.0),
        "final_logit_softcapping": facts.get("final_logit_softcapping", float, 30.0),
        "rope_parameters": rope_parameters(facts),
    }
    return "Gemma2Config", "Gemma2ForCausalLM", fields


def _gemma3(facts: Facts) -> tuple[str, str, Fields]:
    """Layers with a window rotate with a base of their own and are never stretched."""
    local = {"rope_type": "default", "rope_theta": facts.get("rope.freq_base_swa", float, 10_000.0)}
    fields = {
        **_gemma(facts, pattern=6, layers_of_27b=62),
        "final_logit_softcapping": facts.get("final_logit_softcapping", float),
        "rope_parameters": {
            "full_attention": rope_parameters(facts, default_theta=1_000_000.0),
            "sliding_attention": local,
        },
    }
    return "Gemma3TextConfig", "Gemma3ForCausalLM", fields


def _phi3(facts: Facts) -> tuple[str, str, Fields]:
    fields = {**_decoder(facts), "rope_parameters": rope_parameters(facts)}
    fields.pop("head_dim")
    fields["sliding_window"] = facts.get("attention.sliding_window", int) or None
    context = facts.require("context_length", int)
    fields["original_max_position_embeddings"] = facts.get("rope.scaling.original_context_length", int, context)
    return "Phi3Config", "Phi3ForCausalLM", fields


def _gpt2(facts: Facts) -> tuple[str, str, Fields]:
    fields = {
        "n_positions": facts.require("context_length", int),
        "n_embd": facts.width,
        "n_layer": facts.num_layers,
        "n_head": facts.num_heads,
        "n_inner": facts.require("feed_forward_length", int),
        "layer_norm_epsilon": facts.require("attention.layer_norm_epsilon", float),
    }
    return "GPT2Config", "GPT2LMHeadModel", fields


def rope_parameters(facts: Facts, default_theta: float = 10_000.0) -> Fields:
    """`rope_parameters` as transformers 5 has them. Raises ConfigError for a scaling type that is not known."""
    theta = facts.get("rope.freq_base", float, default_theta) or default_theta
    rotated = facts.get("rope.dimension_count", int, facts.head_size) or facts.head_size
    fields: Fields = {"rope_theta": theta, "partial_rotary_factor": rotated / facts.head_size}
    if rotated == facts.head_size:
        del fields["partial_rotary_factor"]
    if "rope_freqs" in facts.rope_factors:
        return {**fields, **_frequency_factors(facts.rope_factors["rope_freqs"], theta, rotated, facts)}
    if "rope_factors_long" in facts.rope_factors:
        return {**fields, **_longrope(facts)}
    kind = facts.get("rope.scaling.type", str, "none")
    factor = facts.get("rope.scaling.factor", float) or facts.get("rope.scale_linear", float) or 1.0
    if kind == "linear" or (kind == "none" and factor != 1.0):
        return {**fields, "rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return {**fields, **_yarn(facts, factor)}
    if kind not in ("none", "longrope"):  # longrope without factors: a model that is not stretched
        raise ConfigError(
            f"{facts.path}: rope scaling type {kind!r} is not supported; known are linear, yarn, longrope."
        )
    return {**fields, "rope_type": "default"}


def _yarn(facts: Facts, factor: float) -> Fields:
    fields: Fields = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": facts.require("rope.scaling.original_context_length", int),
    }
    for name in ("beta_fast", "beta_slow"):
        value = facts.get(f"rope.scaling.yarn_{name}", float)
        if value is not None:
            fields[name] = value
    attention = facts.get("rope.scaling.attn_factor", float, 1.0) or 1.0
    if attention != 1.0:  # llama.cpp multiplies YaRN's own factor with it
        fields["attention_factor"] = attention * (1.0 + 0.1 * math.log(factor))
    return fields


def _longrope(facts: Facts) -> Fields:
    fields: Fields = {
        "rope_type": "longrope",
        "long_factor": list(facts.rope_factors["rope_factors_long"]),
        "short_factor": list(facts.rope_factors["rope_factors_short"]),
        "original_max_position_embeddings": facts.require("rope.scaling.original_context_length", int),
    }
    attention = facts.get("rope.scaling.attn_factor", float)
    if attention is not None:
        fields["attention_factor"] = attention
    return fields


def _frequency_factors(factors: tuple[float, ...], theta: float, rotated: int, facts: Facts) -> Fields:
    """The divisor of each rotary frequency, which is how the converter stores Llama 3.1's rule.

    Every published Llama stretches frequencies between 1 and 4 turns in 8192 tokens, by 8 or 32. If that is what the
    divisors say, it is written as that rule; else as LongRoPE with the same divisors for every length.
    """
    low, high, original, factor = 1.0, 4.0, 8192, max(factors)
    fields: Fields = {"factor": factor, "original_max_position_embeddings": original}
    for i, divisor in enumerate(factors):
        turns = original * theta ** (-2 * i / rotated) / (2 * math.pi)
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        if not math.isclose(divisor, 1 / (kept + (1 - kept) / factor), rel_tol=1e-4):
            context = facts.require("context_length", int)
            fields = {"original_max_position_embeddings": context, "attention_factor": 1.0}
            return {"rope_type": "longrope", "long_factor": list(factors), "short_factor": list(factors), **fields}
    return {"rope_type": "llama3", "low_freq_factor": low, "high_freq_factor": high, **fields}


CONFIGS: dict[str, Callable[[Facts], tuple[str, str, Fields]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "gpt2": _gpt2,
}

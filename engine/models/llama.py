"""Llama, and the one class that builds every family that differs from it by switches only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from octavo.engine.errors import ConfigError
from octavo.engine.layers.attention import AttentionSpec, SelfAttention
from octavo.engine.layers.context import BuildContext
from octavo.engine.layers.decoder import DecoderLayer, RMSNormLM, WeightNames
from octavo.engine.layers.embedding import embedding_and_head
from octavo.engine.layers.mlp import GatedMLP
from octavo.engine.layers.norm import RMSNorm
from octavo.engine.layers.rotary import Rotary, rope_parameters

LLAMA_NAMES = WeightNames(
    modules={
        "q_proj": ("qkv_proj", "q"),
        "k_proj": ("qkv_proj", "k"),
        "v_proj": ("qkv_proj", "v"),
        "gate_proj": ("gate_up_proj", "gate"),
        "up_proj": ("gate_up_proj", "up"),
    }
)


@dataclass(frozen=True, slots=True)
class Traits:
    """Where a family departs from Llama. windows: the sliding window of each layer, None = it sees everything."""

    windows: tuple[int | None, ...]
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False


class LlamaLike(RMSNormLM):
    """Dense decoder with grouped-query attention, rotary positions, RMS norms and a gated mlp."""

    weight_names = LLAMA_NAMES

    def __init__(self, config: Any, ctx: BuildContext, traits: Traits) -> None:
        width, eps, head_size = config.hidden_size, config.rms_norm_eps, head_size_of(config)
        rotary = Rotary(ctx, rope_parameters(config), head_size, config.max_position_embeddings)

        def layer(place: int, window: int | None) -> DecoderLayer:
            spec = AttentionSpec(
                width=width,
                num_heads=config.num_attention_heads,
                num_kv_heads=config.num_key_value_heads,
                head_size=head_size,
                scale=head_size**-0.5,
                window=window,
                qkv_bias=traits.qkv_bias,
                out_bias=traits.out_bias,
            )
            norms = [RMSNorm(ctx, head_size, eps) if traits.qk_norm else None for _ in "qk"]
            return DecoderLayer(
                RMSNorm(ctx, width, eps),
                SelfAttention(ctx, place, spec, rotary, *norms),
                RMSNorm(ctx, width, eps),
                GatedMLP(ctx, width, config.intermediate_size, config.hidden_act, bias=traits.mlp_bias),
            )

        embed, head = embedding_and_head(ctx, config.vocab_size, width, tied=config.tie_word_embeddings)
        mine = ctx.layers(len(traits.windows))
        layers = {number: layer(place, traits.windows[number]) for place, number in enumerate(mine)}
        norm = RMSNorm(ctx, width, eps) if ctx.mesh.pp.is_last else None
        super().__init__(ctx, width, config.vocab_size, embed, layers, norm, head)


def head_size_of(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def windows_by_layer_type(config: Any) -> tuple[int | None, ...]:
    """The sliding window of each layer from `layer_types`. Raises ConfigError for a kind of layer we do not have."""
    by_type = {"full_attention": None, "sliding_attention": config.sliding_window}
    unknown = sorted(set(config.layer_types) - set(by_type))
    if unknown:
        raise ConfigError(f"Layers of type {unknown[0]!r} are not supported; supported are {', '.join(by_type)}.")
    return tuple(by_type[kind] for kind in config.layer_types)


class LlamaForCausalLM(LlamaLike):
    """Llama 1 to 3.x, SmolLM2, and every checkpoint that calls itself Llama."""

    def __init__(self, config: Any, ctx: BuildContext) -> None:
        bias = bool(getattr(config, "attention_bias", False))
        traits = Traits(
            windows=(None,) * config.num_hidden_layers,
            qkv_bias=bias,
            out_bias=bias,
            mlp_bias=bool(getattr(config, "mlp_bias", False)),
        )
        super().__init__(config, ctx, traits)

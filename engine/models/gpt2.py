"""GPT-2: learned positions, LayerNorm, one merged qkv tensor, linear weights stored [in, out]."""

from __future__ import annotations

from typing import Any

from octavo.engine.errors import ConfigError
from octavo.engine.layers.attention import AttentionSpec, SelfAttention
from octavo.engine.layers.context import BuildContext
from octavo.engine.layers.decoder import LayerNormLayer, LayerNormLM, WeightNames, WeightTarget
from octavo.engine.layers.embedding import LearnedPositions, embedding_and_head
from octavo.engine.layers.mlp import PlainMLP
from octavo.engine.layers.norm import LayerNorm


class GPT2Names(WeightNames):
    """`c_proj` is two things, told apart by what it is in."""

    def target(self, name: str) -> WeightTarget | None:
        inner = name.replace("attn.c_proj.", "attn.o_proj.").replace("mlp.c_proj.", "mlp.down_proj.")
        return super().target(inner)


class GPT2LMHeadModel(LayerNormLM):
    """The small, medium, large and xl checkpoints and their fine-tunes."""

    weight_names = GPT2Names(
        prefixes=("transformer.",),
        modules={
            "h": "layers",
            "wte": "embed_tokens",
            "wpe": "embed_positions",
            "ln_f": "norm",
            "ln_1": "attention_norm",
            "ln_2": "mlp_norm",
            "attn": "self_attn",
            "c_attn": "qkv_proj",
            "c_fc": "up_proj",
        },
        ignored=(".attn.bias", ".attn.masked_bias"),  # causal masks saved as buffers
        transposed=frozenset({"c_attn", "o_proj", "c_fc", "down_proj"}),
    )

    def __init__(self, config: Any, ctx: BuildContext) -> None:
        if config.add_cross_attention:
            raise ConfigError("add_cross_attention is set: GPT-2 is supported as a decoder-only model.")
        width, eps, heads = config.hidden_size, config.layer_norm_epsilon, config.num_attention_heads
        inner = 4 * width if config.n_inner is None else config.n_inner

        def layer(place: int, number: int) -> LayerNormLayer:
            scale = (width // heads) ** -0.5 if config.scale_attn_weights else 1.0
            if config.scale_attn_by_inverse_layer_idx:
                scale /= number + 1
            spec = AttentionSpec(width, heads, heads, width // heads, scale, qkv_bias=True, out_bias=True)
            return LayerNormLayer(
                LayerNorm(ctx, width, eps),
                SelfAttention(ctx, place, spec, rotary=None),
                LayerNorm(ctx, width, eps),
                PlainMLP(ctx, width, inner, config.activation_function, bias=True),
            )

        embed, head = embedding_and_head(ctx, config.vocab_size, width, tied=config.tie_word_embeddings)
        pp = ctx.mesh.pp
        super().__init__(
            ctx,
            width,
            config.vocab_size,
            embed,
            LearnedPositions(ctx, config.max_position_embeddings, width) if pp.is_first else None,
            {number: layer(place, number) for place, number in enumerate(ctx.layers(config.num_hidden_layers))},
            LayerNorm(ctx, width, eps) if pp.is_last else None,
            head,
        )

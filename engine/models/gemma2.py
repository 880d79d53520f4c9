"""Gemma 2: windows in every other layer, norms on both sides of each block, soft caps on scores and logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from octavo.engine.errors import ConfigError
from octavo.engine.layers.attention import AttentionSpec, SelfAttention
from octavo.engine.layers.context import BuildContext
from octavo.engine.layers.decoder import RMSNormLM, SandwichLayer
from octavo.engine.layers.embedding import embedding_and_head
from octavo.engine.layers.mlp import GatedMLP
from octavo.engine.layers.norm import RMSNorm
from octavo.engine.layers.rotary import Rotary, rope_parameters
from octavo.engine.models.llama import LLAMA_NAMES, windows_by_layer_type


class GemmaLike(RMSNormLM):
    """Gemma 2 and 3. rotary_of: the rotary of a layer type. qk_norm: RMS norms over each query and key head.

    Gemma's norms store w for a factor of 1 + w; its embeddings are multiplied by √M.
    """

    weight_names = LLAMA_NAMES

    def __init__(self, config: Any, ctx: BuildContext, rotary_of: Callable[[str], Rotary], qk_norm: bool) -> None:
        if getattr(config, "use_bidirectional_attention", None):
            raise ConfigError("use_bidirectional_attention is set: an encoder cannot be served as a language model.")
        width, vocab_size = config.hidden_size, config.vocab_size

        def norm(size: int = width) -> RMSNorm:
            return RMSNorm(ctx, size, config.rms_norm_eps, offset=1.0)

        def layer(place: int, window: int | None, kind: str) -> SandwichLayer:
            spec = AttentionSpec(
                width=width,
                num_heads=config.num_attention_heads,
                num_kv_heads=config.num_key_value_heads,
                head_size=config.head_dim,
                scale=config.query_pre_attn_scalar**-0.5,
                window=window,
                soft_cap=config.attn_logit_softcapping,
                qkv_bias=config.attention_bias,
                out_bias=config.attention_bias,
            )
            head_norms = [norm(config.head_dim) if qk_norm else None for _ in "qk"]
            return SandwichLayer(
                [norm() for _ in range(4)],
                SelfAttention(ctx, place, spec, rotary_of(kind), *head_norms),
                GatedMLP(ctx, width, config.intermediate_size, config.hidden_activation),
            )

        embed, head = embedding_and_head(
            ctx,
            vocab_size,
            width,
            tied=config.tie_word_embeddings,
            scale=width**0.5,
            soft_cap=config.final_logit_softcapping,
        )
        windows, kinds = windows_by_layer_type(config), config.layer_types
        mine = ctx.layers(len(kinds))
        layers = {number: layer(place, windows[number], kinds[number]) for place, number in enumerate(mine)}
        super().__init__(ctx, width, vocab_size, embed, layers, norm() if ctx.mesh.pp.is_last else None, head)


class Gemma2ForCausalLM(GemmaLike):
    """One rotary for all layers."""

    def __init__(self, config: Any, ctx: BuildContext) -> None:
        rotary = Rotary(ctx, rope_parameters(config), config.head_dim, config.max_position_embeddings)
        super().__init__(config, ctx, lambda kind: rotary, qk_norm=False)

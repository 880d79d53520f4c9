"""OPT: learned positions counted from 2, LayerNorm before or after each block, maybe narrower embeddings."""

from __future__ import annotations

from typing import Any

import torch

from octavo.engine.layers.attention import AttentionSpec, SelfAttention
from octavo.engine.layers.context import BuildContext
from octavo.engine.layers.decoder import LayerNormLayer, LayerNormLM, WeightNames, WeightTarget
from octavo.engine.layers.embedding import LearnedPositions, embedding_and_head
from octavo.engine.layers.linear import ReplicatedLinear
from octavo.engine.layers.mlp import PlainMLP
from octavo.engine.layers.norm import LayerNorm

EPS = 1e-5


class OPTNames(WeightNames):
    """`final_layer_norm` is a block's second norm inside a layer, and the model's last norm outside."""

    def target(self, name: str) -> WeightTarget | None:
        inner = name.replace("final_layer_norm", "mlp_norm") if ".layers." in f".{name}" else name
        return super().target(inner)


class OPTForCausalLM(LayerNormLM):
    """125m to 66b."""

    weight_names = OPTNames(
        prefixes=("model.decoder.", "decoder."),
        modules={
            "final_layer_norm": "norm",
            "self_attn_layer_norm": "attention_norm",
            "q_proj": ("qkv_proj", "q"),
            "k_proj": ("qkv_proj", "k"),
            "v_proj": ("qkv_proj", "v"),
            "out_proj": "o_proj",
            "fc1": "mlp.up_proj",
            "fc2": "mlp.down_proj",
        },
    )

    def __init__(self, config: Any, ctx: BuildContext) -> None:
        width, heads, bias = config.hidden_size, config.num_attention_heads, config.enable_bias
        affine, first = config.layer_norm_elementwise_affine, config.do_layer_norm_before

        def layer(place: int) -> LayerNormLayer:
            head_size = width // heads
            spec = AttentionSpec(width, heads, heads, head_size, head_size**-0.5, qkv_bias=bias, out_bias=bias)
            return LayerNormLayer(
                LayerNorm(ctx, width, EPS, affine),
                SelfAttention(ctx, place, spec, rotary=None),
                LayerNorm(ctx, width, EPS, affine),
                PlainMLP(ctx, width, config.ffn_dim, config.activation_function, bias=bias),
                norm_first=first,
            )

        narrow, pp = config.word_embed_proj_dim, ctx.mesh.pp
        embed, head = embedding_and_head(ctx, config.vocab_size, narrow, tied=config.tie_word_embeddings)
        last_norm = first and not config._remove_final_layer_norm
        super().__init__(
            ctx,
            width,
            config.vocab_size,
            embed,
            LearnedPositions(ctx, config.max_position_embeddings, width, offset=2) if pp.is_first else None,
            {number: layer(place) for place, number in enumerate(ctx.layers(config.num_hidden_layers))},
            LayerNorm(ctx, width, EPS, affine) if last_norm and pp.is_last else None,
            head,
        )
        projected = narrow != width
        self.project_in = ReplicatedLinear(ctx, narrow, width, bias=False) if projected and pp.is_first else None
        self.feature_size = narrow
        self.project_out = ReplicatedLinear(ctx, width, narrow, bias=False) if projected and pp.is_last else None

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = super().embed(input_ids)
        return x if self.project_in is None else self.project_in(x)

    def local_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().local_logits(self.features(hidden))

    def features(self, pooled: torch.Tensor) -> torch.Tensor:
        return pooled if self.project_out is None else self.project_out(pooled)

"""Encoders put together from blocks: attention over whole rows, and the shell that BERT's family shares.

No KV is kept: a prompt is computed in one step, and nothing comes after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from octavo.engine.layers.attention import KVCaches
from octavo.engine.layers.context import BuildContext
from octavo.engine.layers.decoder import CausalLM, LayerNormLayer
from octavo.engine.layers.embedding import LearnedPositions, VocabParallelEmbedding
from octavo.engine.layers.heads import share_heads
from octavo.engine.layers.linear import QKVLinear, row_parallel
from octavo.engine.layers.mlp import PlainMLP
from octavo.engine.layers.norm import LayerNorm
from octavo.engine.layers.weight import Cut
from octavo.kernels.ops import AttentionBatch


class RowSelfAttention(nn.Module):
    """Projections with biases, and attention of every token over all of its row. x: [T, M] → [T, M]."""

    def __init__(self, ctx: BuildContext, width: int, num_heads: int) -> None:
        super().__init__()
        shares = share_heads(num_heads, num_heads, ctx.mesh.tp.size)
        heads = Cut(tuple(share.query for share in shares), ctx.mesh.tp.rank, num_heads)
        self.head_size = width // num_heads
        self.scale = self.head_size**-0.5
        self.qkv_proj = QKVLinear(ctx, width, heads, heads, self.head_size, bias=True)
        self.o_proj = row_parallel(ctx, heads.times(self.head_size), width, bias=True)
        self.row_attention = ctx.ops.row_attention

    def forward(self, x: torch.Tensor, positions: torch.Tensor, kv: KVCaches, batch: AttentionBatch) -> torch.Tensor:
        qkv = self.qkv_proj(x).view(x.shape[0], -1, self.head_size)
        query, key, value = qkv.chunk(3, dim=1)
        return self.o_proj(self.row_attention(query, key, value, batch, self.scale).flatten(1))


@dataclass(frozen=True, slots=True)
class EncoderShape:
    """Sizes of the whole model. position_offset: rows of the position table before the one of position 0; token_types:
    that the checkpoint tells apart, 0 = it has no table of them."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    inner: int
    activation: str
    eps: float
    positions: int
    position_offset: int = 0
    token_types: int = 0


class Encoder(CausalLM):
    """BERT: words, positions and token types summed and normed, then blocks with their norms behind the sums.

    A token of type t is named id + t × vocab_size (see octavo.engine.pooling.info). Between stages goes [T, width].
    """

    def __init__(self, ctx: BuildContext, shape: EncoderShape) -> None:
        width, first = shape.width, ctx.mesh.pp.is_first

        def layer() -> LayerNormLayer:
            return LayerNormLayer(
                LayerNorm(ctx, width, shape.eps),
                RowSelfAttention(ctx, width, shape.heads),
                LayerNorm(ctx, width, shape.eps),
                PlainMLP(ctx, width, shape.inner, shape.activation, bias=True),
                norm_first=False,
            )

        words = VocabParallelEmbedding(ctx, shape.vocab_size, width) if first else None
        layers: Mapping[int, nn.Module] = {number: layer() for number in ctx.layers(shape.layers)}
        super().__init__(ctx, width, shape.vocab_size, words, layers, norm=None, lm_head=None)
        rows, offset = shape.positions - shape.position_offset, shape.position_offset
        self.embed_positions = LearnedPositions(ctx, rows, width, offset) if first else None
        self.token_types = LearnedPositions(ctx, shape.token_types, width) if first and shape.token_types else None
        self.num_types = shape.token_types
        self.embed_norm = LayerNorm(ctx, width, shape.eps) if first else None

    def forward(self, x: torch.Tensor, positions: torch.Tensor, kv: KVCaches, batch: AttentionBatch) -> torch.Tensor:
        if self.embed_tokens is not None:
            x = self.embed(x, positions)
        for layer in self.layers.values():
            x = layer(x, positions, kv, batch)
        return x

    def embed(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[T], [T] → [T, M]."""
        assert self.embed_tokens is not None
        assert self.embed_positions is not None
        assert self.embed_norm is not None
        types = torch.zeros_like(input_ids)
        for higher in range(1, self.num_types):
            types += input_ids >= higher * self.vocab_size
        x = self.embed_tokens(input_ids - types * self.vocab_size) + self.embed_positions(positions)
        if self.token_types is not None:
            x = x + self.token_types(types)
        return self.embed_norm(x)

"""Decoder-only models put together from blocks: the shared shell, and the three blocks dense families use.

A family gives the shell its embedding, blocks, last norm and head; what it adds beyond that is in its own file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from octavo.engine.layers.attention import KVCaches, SelfAttention
from octavo.engine.layers.embedding import LearnedPositions, LMHead, VocabParallelEmbedding
from octavo.engine.layers.kv import KVSpec
from octavo.engine.layers.norm import LayerNorm, RMSNorm
from octavo.kernels.ops import AttentionBatch


@dataclass(frozen=True, slots=True)
class WeightTarget:
    """Where a checkpoint tensor goes: module path, Weight name, part (None: all parts in order)."""

    module: str
    weight: str
    part: str | None
    transpose: bool


@dataclass(frozen=True, slots=True)
class WeightNames:
    """How a family's checkpoint names become ours.

    prefixes: dropped from the front of a name, the first that fits; absent ones do no harm. modules: a path segment of
    the checkpoint → ours, or (ours, part) where several tensors are merged. ignored: endings of names that carry no
    weight of the model. transposed: checkpoint segments whose `.weight` is stored [in, out].
    """

    prefixes: tuple[str, ...] = ("model.",)
    modules: Mapping[str, str | tuple[str, str]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    transposed: frozenset[str] = frozenset()

    def target(self, name: str) -> WeightTarget | None:
        """None: the tensor is ignored."""
        if name.endswith(self.ignored):
            return None
        prefix = next((prefix for prefix in self.prefixes if name.startswith(prefix)), "")
        *path, weight = name.removeprefix(prefix).split(".")
        transpose = bool(path) and weight == "weight" and path[-1] in self.transposed
        part = None
        for i, segment in enumerate(path):
            ours = self.modules.get(segment, segment)
            path[i], part = (ours, part) if isinstance(ours, str) else ours
        return WeightTarget(".".join(path), weight, part, transpose)


class CausalLM(nn.Module):
    """Token ids in, hidden states out; logits of chosen rows on demand.

    Subclasses build `embed_tokens`, `layers`, `norm` and `lm_head` and pass them here.
    """

    weight_names: ClassVar[WeightNames] = WeightNames()

    def __init__(
        self,
        embed_tokens: VocabParallelEmbedding,
        layers: Iterable[nn.Module],
        norm: RMSNorm | LayerNorm | None,
        lm_head: LMHead,
    ) -> None:
        super().__init__()
        self.embed_tokens, self.layers = embed_tokens, nn.ModuleList(layers)
        self.norm, self.lm_head = norm, lm_head
        self.vocab_size = lm_head.vocab_size

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv: KVCaches,
        batch: AttentionBatch,
    ) -> torch.Tensor:
        """input_ids, positions: [T] int64; kv: (key, value) caches per attention layer → hidden [T, M], normed."""
        raise NotImplementedError

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [R, M] rows of forward's result → [R, V] float32."""
        return self.lm_head(hidden)

    def kv_specs(self) -> tuple[KVSpec, ...]:
        """One per attention layer; the index is the layer's place in `kv`."""
        found = [module.attention for module in self.modules() if isinstance(module, SelfAttention)]
        return tuple(attention.kv_spec for attention in sorted(found, key=lambda attention: attention.index))


class RMSNormLM(CausalLM):
    """Shell of the families whose blocks hand on (x, residual), so that each add is fused with the norm after it."""

    norm: RMSNorm

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, kv: KVCaches, batch: AttentionBatch
    ) -> torch.Tensor:
        x, residual = self.embed_tokens(input_ids), None
        for layer in self.layers:
            x, residual = layer(x, residual, positions, kv, batch)
        return self.norm(x) if residual is None else self.norm.add(x, residual)[0]


class LayerNormLM(CausalLM):
    """Shell of the families with learned positions and LayerNorm blocks."""

    def __init__(
        self,
        embed_tokens: VocabParallelEmbedding,
        embed_positions: LearnedPositions,
        layers: Iterable[nn.Module],
        norm: LayerNorm | None,
        lm_head: LMHead,
    ) -> None:
        super().__init__(embed_tokens, layers, norm, lm_head)
        self.embed_positions = embed_positions

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, kv: KVCaches, batch: AttentionBatch
    ) -> torch.Tensor:
        x = self.embed(input_ids) + self.embed_positions(positions)
        for layer in self.layers:
            x = layer(x, positions, kv, batch)
        return x if self.norm is None else self.norm(x)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[T] → [T, M]."""
        return self.embed_tokens(input_ids)


class DecoderLayer(nn.Module):
    """Llama's block: x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(
        self, input_layernorm: RMSNorm, self_attn: SelfAttention, post_attention_layernorm: RMSNorm, mlp: nn.Module
    ) -> None:
        super().__init__()
        self.input_layernorm, self.self_attn = input_layernorm, self_attn
        self.post_attention_layernorm, self.mlp = post_attention_layernorm, mlp

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        positions: torch.Tensor,
        kv: KVCaches,
        batch: AttentionBatch,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            x, residual = self.input_layernorm(x), x
        else:
            x, residual = self.input_layernorm.add(x, residual)
        x, residual = self.post_attention_layernorm.add(self.self_attn(x, positions, kv, batch), residual)
        return self.mlp(x), residual


class SandwichLayer(nn.Module):
    """Gemma 2's block: x += norm(attention(norm(x))); x += norm(mlp(norm(x))), each norm its own."""

    def __init__(self, norms: Sequence[RMSNorm], self_attn: SelfAttention, mlp: nn.Module) -> None:
        """norms: before attention, after it, before the mlp, after it."""
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = norms[0], norms[1]
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norms[2], norms[3]
        self.self_attn, self.mlp = self_attn, mlp

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        positions: torch.Tensor,
        kv: KVCaches,
        batch: AttentionBatch,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            x, residual = self.input_layernorm(x), x
        else:
            x, residual = self.input_layernorm.add(x, residual)
        x = self.post_attention_layernorm(self.self_attn(x, positions, kv, batch))
        x, residual = self.pre_feedforward_layernorm.add(x, residual)
        return self.post_feedforward_layernorm(self.mlp(x)), residual


class LayerNormLayer(nn.Module):
    """GPT-2's block. norm_first false (OPT 350m): each norm comes after its sum instead."""

    def __init__(
        self,
        attention_norm: LayerNorm,
        self_attn: SelfAttention,
        mlp_norm: LayerNorm,
        mlp: nn.Module,
        norm_first: bool = True,
    ) -> None:
        super().__init__()
        self.attention_norm, self.self_attn, self.mlp_norm, self.mlp = attention_norm, self_attn, mlp_norm, mlp
        self.norm_first = norm_first

    def forward(self, x: torch.Tensor, positions: torch.Tensor, kv: KVCaches, batch: AttentionBatch) -> torch.Tensor:
        if self.norm_first:
            x = x + self.self_attn(self.attention_norm(x), positions, kv, batch)
            return x + self.mlp(self.mlp_norm(x))
        x = self.attention_norm(x + self.self_attn(x, positions, kv, batch))
        return self.mlp_norm(x + self.mlp(x))

"""Decoder-only models put together from blocks: the shared shell, and the three blocks dense families use.

A family gives the shell its embedding, blocks, last norm and head; what it adds beyond that is in its own file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from octavo.engine.layers.attention import KVCaches, SelfAttention
from octavo.engine.layers.context import BuildContext
from octavo.engine.layers.embedding import LearnedPositions, LMHead, VocabParallelEmbedding, vocab_shares
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


class Numbered(nn.ModuleDict):
    """A stage's layers in order, by their numbers in the whole model, which are their names in a checkpoint too."""

    def __init__(self, layers: Mapping[int, nn.Module]) -> None:
        super().__init__({str(number): layer for number, layer in layers.items()})

    def __getitem__(self, number: int | str) -> nn.Module:
        return super().__getitem__(str(number))


class CausalLM(nn.Module):
    """One pipeline stage of a decoder: token ids or hidden states in, hidden states out; logits of chosen rows.

    Subclasses build what the stage has and pass it here: `embed_tokens` the first (and the last, if the head is tied to
    it), `layers` by their number in the whole model, `norm` and `lm_head` the last. Between stages goes one tensor
    [T, width]: the sum of the residual and what the last block added, exactly as the next block's norm would take it
    in, so that stages compute bit for bit what one does.
    """

    weight_names: ClassVar[WeightNames] = WeightNames()

    def __init__(
        self,
        ctx: BuildContext,
        width: int,
        vocab_size: int,
        embed_tokens: VocabParallelEmbedding | None,
        layers: Mapping[int, nn.Module],
        norm: RMSNorm | LayerNorm | None,
        lm_head: LMHead | None,
    ) -> None:
        super().__init__()
        self.embed_tokens = embed_tokens
        self.layers = Numbered(layers)
        self.norm, self.lm_head = norm, lm_head
        self.score: nn.Module | None = None  # of a model with classes, on the last stage
        self.feature_size = width
        self.width, self.vocab_size, self.pp, self.tp = width, vocab_size, ctx.mesh.pp, ctx.mesh.tp
        # All stages in one, without memory: what the checkpoint may hold besides this stage's tensors. In a list, so
        # that it is no part of this one. Empty: this is all there is.
        self.whole: list[CausalLM] = []

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        kv: KVCaches,
        batch: AttentionBatch,
    ) -> torch.Tensor:
        """x: input ids [T] int64 on the first stage, later what the stage before returned, which is given up;
        positions: [T] int64; kv: (key, value) caches of the stage's layers → hidden [T, width], normed on the last."""
        raise NotImplementedError

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [R, width] rows of the last stage's result → [R, V] float32 on every tp rank, whole rows gathered."""
        local = self.local_logits(hidden)
        return self.tp.gather_shares(local, self.vocab_shares)

    def local_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """As `logits`, but only the token ids of this rank: [R, len(vocab_shares[tp rank])]."""
        assert self.lm_head is not None, "only the last stage has the head"
        return self.lm_head(hidden)

    def features(self, pooled: torch.Tensor) -> torch.Tensor:
        """pooled: [R, width], made of rows of the last stage's result → [R, feature_size], what embeddings and classes
        are made of. Linear, so that it may come after a mean."""
        return pooled

    @property
    def vocab_shares(self) -> tuple[range, ...]:
        """The token ids of every tp rank."""
        return vocab_shares(self.tp, self.vocab_size)

    def kv_specs(self) -> tuple[KVSpec, ...]:
        """One per attention layer of the stage; the index is the layer's place in `kv`."""
        found = [module.attention for module in self.modules() if isinstance(module, SelfAttention)]
        return tuple(attention.kv_spec for attention in sorted(found, key=lambda attention: attention.index))


class RMSNormLM(CausalLM):
    """Shell of the families whose blocks hand on (x, residual), so that each add is fused with the norm after it."""

    norm: RMSNorm | None

    def forward(self, x: torch.Tensor, positions: torch.Tensor, kv: KVCaches, batch: AttentionBatch) -> torch.Tensor:
        residual: torch.Tensor | None = None
        if self.pp.is_first:
            assert self.embed_tokens is not None
            x = self.embed_tokens(x)
        for layer in self.layers.values():
            x, residual = layer(x, residual, positions, kv, batch)
        assert residual is not None, "every stage has a layer"
        if self.norm is not None:
            return self.norm.add(x, residual)[0]
        # The sum alone, by the op that all the other sums are made with.
        return layer.input_layernorm.add(x, residual)[1]


class LayerNormLM(CausalLM):
    """Shell of the families with learned positions and LayerNorm blocks. Positions are added on the first stage."""

    norm: LayerNorm | None

    def __init__(
        self,
        ctx: BuildContext,
        width: int,
        vocab_size: int,
        embed_tokens: VocabParallelEmbedding | None,
        embed_positions: LearnedPositions | None,
        layers: Mapping[int, nn.Module],
        norm: LayerNorm | None,
        lm_head: LMHead | None,
    ) -> None:
        super().__init__(ctx, width, vocab_size, embed_tokens, layers, norm, lm_head)
        self.embed_positions = embed_positions

    def forward(self, x: torch.Tensor, positions: torch.Tensor, kv: KVCaches, batch: AttentionBatch) -> torch.Tensor:
        if self.embed_positions is not None:
            x = self.embed(x) + self.embed_positions(positions)
        for layer in self.layers.values():
            x = layer(x, positions, kv, batch)
        return x if self.norm is None else self.norm(x)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[T] → [T, M]."""
        assert self.embed_tokens is not None
        return self.embed_tokens(input_ids)


class DecoderLayer(nn.Module):
    """Llama's block: x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(
        self, input_layernorm: RMSNorm, self_attn: SelfAttention, post_attention_layernorm: RMSNorm, mlp: nn.Module
    ) -> None:
        super().__init__()
        self.input_layernorm, self.self_attn = input_layernorm, self_attn
        self.post_attention_layernorm, self.mlp = post_attention_layernorm, mlp
        self_attn.qkv_proj.fed_by(input_layernorm)
        mlp.fed_by(post_attention_layernorm)
        self_attn.o_proj.leave_sum()
        mlp.leave_sum()

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
        self_attn.qkv_proj.fed_by(norms[0])
        mlp.fed_by(norms[2])

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

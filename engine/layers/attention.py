"""Self-attention over the paged KV of earlier tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from octavo.engine.layers.context import BuildContext
from octavo.engine.layers.heads import share_heads
from octavo.engine.layers.kv import KVSpec
from octavo.engine.layers.linear import QKVLinear, row_parallel
from octavo.engine.layers.norm import RMSNorm
from octavo.engine.layers.rotary import Rotary
from octavo.engine.layers.weight import Cut
from octavo.engine.parallel.mesh import Unsummed
from octavo.kernels.ops import AttentionBatch

__all__ = ["Attention", "AttentionSpec", "KVSpec", "SelfAttention"]

KVCaches = Sequence[tuple[torch.Tensor, torch.Tensor]]


class Attention:
    """Stores the step's KV in the layer's blocks, then attends. No weights.

    index: the layer's place in `kv`, which holds those of the stage.
    """

    def __init__(
        self, ctx: BuildContext, index: int, kv_spec: KVSpec, scale: float, soft_cap: float | None = None
    ) -> None:
        self.index, self.kv_spec, self.scale, self.soft_cap = index, kv_spec, scale, soft_cap
        self.window = kv_spec.window
        self.write_kv, self.paged_attention = ctx.ops.write_kv, ctx.ops.paged_attention

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kv: KVCaches, batch: AttentionBatch
    ) -> torch.Tensor:
        """query: [T, Hq, D]; key, value: [T, Hkv, D], all per rank → [T, Hq, D]."""
        key_cache, value_cache = kv[self.index]
        self.write_kv(key, value, key_cache, value_cache, batch.slot_mapping)
        return self.paged_attention(query, key_cache, value_cache, batch, self.scale, self.window, self.soft_cap)


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """The shape of one layer's attention; head counts of the whole model. window, soft_cap: see ops.PagedAttention."""

    width: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    window: int | None = None
    soft_cap: float | None = None
    qkv_bias: bool = False
    out_bias: bool = False


class SelfAttention(nn.Module):
    """Projections, per-head norms, rotation, attention. x: [T, M] → [T, M].

    rotary None: positions reach the model another way. q_norm, k_norm: RMS norms over a head, before the rotation.
    """

    def __init__(
        self,
        ctx: BuildContext,
        index: int,
        spec: AttentionSpec,
        rotary: Rotary | None,
        q_norm: RMSNorm | None = None,
        k_norm: RMSNorm | None = None,
    ) -> None:
        super().__init__()
        tp, shares = ctx.mesh.tp, share_heads(spec.num_heads, spec.num_kv_heads, ctx.mesh.tp.size)
        query = Cut(tuple(share.query for share in shares), tp.rank, spec.num_heads)
        kv = Cut(tuple(share.kv for share in shares), tp.rank, spec.num_kv_heads)
        kv_heads = len(kv.share)
        self.heads, self.head_size = (len(query.share), kv_heads, kv_heads), spec.head_size
        self.qkv_proj = QKVLinear(ctx, spec.width, query, kv, spec.head_size, bias=spec.qkv_bias)
        self.o_proj = row_parallel(ctx, query.times(spec.head_size), spec.width, bias=spec.out_bias)
        self.q_norm, self.k_norm, self.rotary = q_norm, k_norm, rotary
        kv_dtype = str(ctx.kv_dtype or ctx.dtype).removeprefix("torch.")
        kv_spec = KVSpec(kv_heads, spec.head_size, kv_dtype, spec.window)
        self.attention = Attention(ctx, index, kv_spec, spec.scale, spec.soft_cap)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, kv: KVCaches, batch: AttentionBatch
    ) -> torch.Tensor | Unsummed:
        qkv = self.qkv_proj(x).view(x.shape[0], -1, self.head_size)
        query, key, value = qkv.split(self.heads, dim=1)
        if self.q_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if self.rotary is not None:
            query, key = self.rotary(query, key, positions)
        return self.o_proj(self.attention(query, key, value, kv, batch).flatten(1))

"""Attention over blocks in torch's operations alone, none of which waits for a device: slow in memory, quick to record.

As octavo.kernels.ref defines them, but that it looks at lengths on the host.
"""

import torch

from octavo.kernels.ops import AttentionBatch


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """What is not to be written repeats the write of one that is, or what is there."""
    block_size = key_cache.shape[2]
    written = slot_mapping >= 0
    first = written.to(torch.int64).argmax()
    token = torch.where(written, torch.arange(len(slot_mapping)), first)
    slot = slot_mapping.index_select(0, token).clamp(min=0)
    block, offset = slot // block_size, slot % block_size
    for cache, new in ((key_cache, key), (value_cache, value)):
        rows = torch.where(written.any(), new.index_select(0, token).to(cache.dtype), cache[block, :, offset])
        cache[block, :, offset] = rows


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> torch.Tensor:
    token = torch.arange(len(query))
    row = (torch.searchsorted(batch.query_start, token, right=True) - 1).clamp(max=len(batch.context_lens) - 1)
    position = batch.context_lens[row] - batch.query_start[row + 1] + token
    keys, values = (_gathered(cache, batch.block_tables, row, query.shape[1]) for cache in (key_cache, value_cache))
    scores = torch.einsum("thd,thnd->thn", query.float(), keys) * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    at = torch.arange(scores.shape[2])
    hidden = at[None, :] > position[:, None]
    if window is not None:
        hidden |= at[None, :] <= position[:, None] - window
    weights = scores.masked_fill(hidden[:, None, :], -torch.inf).softmax(dim=-1)
    return torch.einsum("thn,thnd->thd", weights, values).to(query.dtype)


def _gathered(cache: torch.Tensor, tables: torch.Tensor, row: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[T, Hq, MB * BS, D] float32"""
    blocks = cache[tables].permute(0, 2, 1, 3, 4).flatten(2, 3).float()  # [S, Hkv, MB * BS, D]
    return blocks.repeat_interleave(num_heads // cache.shape[1], dim=1)[row]

"""Paged causal attention. Shapes and contracts: `octavo.kernels.ops`.

Rows of one token (decode) are gathered and computed together; each longer row is computed by itself, in slices of
queries that see only the KV they may look at. So the working memory is bounded, whatever the step holds.
"""

from itertools import pairwise

import torch

from octavo.kernels.ops import AttentionBatch
from octavo.kernels.ref.cache import read_blocks

MAX_GATHERED = 1 << 24  # elements of K (and of V) gathered at once for one-token rows
MAX_QUERY_SLICE = 512  # queries of one row computed at once


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> torch.Tensor:
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if batch.max_query_len == 1 and query.shape[0] == batch.block_tables.shape[0]:
        _one_token_rows(query, key_cache, value_cache, batch, None, scale, window, soft_cap, out)
        return out
    starts, contexts = batch.query_start.tolist(), batch.context_lens.tolist()
    single = [s for s in range(len(contexts)) if starts[s + 1] - starts[s] == 1]
    if single:
        rows = torch.tensor(single, device=query.device)
        _one_token_rows(query, key_cache, value_cache, batch, rows, scale, window, soft_cap, out)
    for s, context in enumerate(contexts):
        if starts[s + 1] - starts[s] > 1:
            mine = slice(starts[s], starts[s + 1])
            table = batch.block_tables[s]
            out[mine] = _row(query[mine], key_cache, value_cache, table, context, scale, window, soft_cap)
    return out


def row_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: AttentionBatch, scale: float
) -> torch.Tensor:
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    group = query.shape[1] // key.shape[1]
    starts = batch.query_start.tolist()
    for start, end in pairwise(starts):
        keys, values = (x[start:end].float().transpose(0, 1).repeat_interleave(group, 0) for x in (key, value))
        for first in range(start, end, MAX_QUERY_SLICE):
            last = min(first + MAX_QUERY_SLICE, end)
            hidden = torch.zeros(1, dtype=torch.bool, device=query.device)
            result = _attend(query[first:last].transpose(0, 1), keys, values, hidden, scale, None)
            out[first:last] = result.transpose(0, 1)
    return out


def _one_token_rows(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    batch: AttentionBatch,
    rows: torch.Tensor | None,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    out: torch.Tensor,
) -> None:
    """Fill out's rows of the sequences `rows` (None = all, and the token of sequence s is token s)."""
    (num_kv_heads, block_size), head_size = key_cache.shape[1:3], query.shape[2]
    width = -(-batch.max_context_len // block_size)
    if window is not None:  # a window starts anywhere in its first block
        width = min(width, -(-(window - 1) // block_size) + 1)
    tables, contexts = batch.block_tables, batch.context_lens
    tokens = None
    if rows is not None:
        tables, contexts, tokens = tables[rows], contexts[rows], batch.query_start[rows].long()
        query = query[tokens]
    at_once = max(1, MAX_GATHERED // (width * block_size * num_kv_heads * head_size))
    for first in range(0, len(contexts), at_once):
        some = slice(first, first + at_once)
        context = contexts[some].long().unsqueeze(1)  # [S, 1]
        begin = (context - window).clamp_(min=0) if window is not None else torch.zeros_like(context)
        columns = begin // block_size + torch.arange(width, device=query.device)  # [S, width] of the block tables
        # Columns past the table's end hold no visible slot; they only have to be legal to read.
        blocks = tables[some].gather(1, columns.clamp(max=tables.shape[1] - 1)).long()
        offsets = torch.arange(block_size, device=query.device)
        position = (columns.unsqueeze(2) * block_size + offsets).flatten(1)  # [S, L]
        hidden = ((position < begin) | (position >= context))[:, None, :]  # [S, 1, L]
        shape = (len(context), num_kv_heads, width * block_size, head_size)
        key = read_blocks(key_cache, blocks).transpose(1, 2).reshape(shape)
        # A hidden slot may hold anything, NaN too, and 0 * NaN would reach the sum.
        value = read_blocks(value_cache, blocks).transpose(1, 2).reshape(shape)
        value = value.masked_fill(hidden.transpose(1, 2).unsqueeze(1), 0.0)
        grouped = query[some].reshape(len(context), num_kv_heads, -1, head_size)
        result = _attend(grouped, key, value, hidden.unsqueeze(1), scale, soft_cap).reshape(query[some].shape)
        if tokens is None:
            out[some] = result
        else:
            out[tokens[some]] = result.to(out.dtype)


def _row(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    table: torch.Tensor,
    context: int,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> torch.Tensor:
    """One sequence. query: [T, Hq, D], its newest T positions; table: [MB]. Returns [T, Hq, D]."""
    num_tokens, num_heads, head_size = query.shape
    num_kv_heads, block_size = key_cache.shape[1:3]
    group = num_heads // num_kv_heads
    start = context - num_tokens  # position of the row's first query
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    for first in range(0, num_tokens, MAX_QUERY_SLICE):
        last = min(first + MAX_QUERY_SLICE, num_tokens)
        low = max(0, start + first - window + 1) if window is not None else 0
        low -= low % block_size
        high = start + last  # KV positions [low, high) are seen by some query of the slice
        blocks = table[low // block_size : -(-high // block_size)]
        key = read_blocks(key_cache, blocks).transpose(0, 1).flatten(1, 2)[:, : high - low]  # [Hkv, L, D]
        value = read_blocks(value_cache, blocks).transpose(0, 1).flatten(1, 2)[:, : high - low]
        at = torch.arange(start + first, high, device=query.device).unsqueeze(1)  # [t, 1]
        position = torch.arange(low, high, device=query.device)
        hidden = position > at
        if window is not None:
            hidden |= position <= at - window
        part = query[first:last].reshape(-1, num_kv_heads, group, head_size).permute(1, 2, 0, 3)  # [Hkv, G, t, D]
        result = _attend(part.flatten(1, 2), key, value, hidden.repeat(group, 1), scale, soft_cap)
        result = result.reshape(num_kv_heads, group, last - first, head_size).permute(2, 0, 1, 3)
        out[first:last] = result.reshape(last - first, num_heads, head_size)
    return out


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    hidden: torch.Tensor,
    scale: float,
    soft_cap: float | None,
) -> torch.Tensor:
    """softmax(query · key) · value in float32. query [..., N, D]; key, value [..., L, D]; hidden [..., N or 1, L]."""
    scores = torch.matmul(query.float() * scale, key.transpose(-1, -2))
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    return torch.matmul(torch.softmax(scores.masked_fill_(hidden, float("-inf")), dim=-1), value)

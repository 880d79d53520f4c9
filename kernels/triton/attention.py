"""Paged causal attention. Shapes and contract: `octavo.kernels.ops`.

Rows with few queries (decode, verification of drafts) are split along their KV, so that few sequences with long
contexts keep the whole device busy, and a second launch adds the parts up (flash-decoding, as Dao et al. describe it:
https://pytorch.org/blog/flash-decoding). Longer rows are cut into tiles of queries. A step that may hold both launches
both; each leaves the other's rows alone.

All that depends on lengths is read on the device. Grids depend on the number of tokens and sequences and on the maxima,
which are bounds: larger than true they cost programs that end at once, as in a CUDA graph that is replayed.

Layout asked for: key and value caches of the same strides, blocks contiguous.
"""

from dataclasses import dataclass, replace
from functools import cache, lru_cache

import torch
import triton
import triton.language as tl

from octavo.kernels.ops import AttentionBatch
from octavo.kernels.triton.attention_tile import find_sequence, sweep
from octavo.kernels.triton.cache import split_cache
from octavo.kernels.triton.tiles import AttentionTile, attention_tile, processors

LOG2_E = 1.4426950408889634
MOST_PARTS = 64  # of one sequence's KV
LEAST_TILES = 2  # of BLOCK_N in a part


@triton.jit
def _share(low, high, num_parts, BLOCK_N: tl.constexpr, LEAST_TILES: tl.constexpr):
    """(first position, positions per part) of KV [low, high) cut into at most num_parts parts."""
    first = low // BLOCK_N
    tiles = tl.cdiv(high, BLOCK_N) - first
    return first * BLOCK_N, tl.maximum(tl.cdiv(tiles, num_parts), LEAST_TILES) * BLOCK_N


@triton.jit
def _lowest(position, window, WINDOWED: tl.constexpr):
    """The first KV position that a token sees."""
    if WINDOWED:
        return tl.maximum(position - window + 1, 0)
    return position * 0


@triton.jit(do_not_specialize=["num_parts", "window"])
def _attend_parts(
    out,  # [T, Hq, D], contiguous; written if there is one part
    part_sums,  # [S, Hkv, num_parts, BLOCK_M, D] float32: attention within the part
    part_mass,  # [S, Hkv, num_parts, BLOCK_M] float32: log2 of its sum of weights
    query,  # [T, Hq, D]
    keys,  # [NB, Hkv, BLOCK_SIZE, D]
    values,
    key_scales,  # [NB, Hkv, BLOCK_SIZE]
    value_scales,
    tables,  # [S, MB]
    query_start,  # [S + 1]
    context_lens,  # [S]
    num_parts,
    window,
    scale,
    soft_cap,
    query_token,
    query_head,
    block_stride,
    head_stride,
    scale_block_stride,
    scale_head_stride,
    table_stride,
    num_heads,
    head_size: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LEAST_TILES: tl.constexpr,
    QUANTIZED: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    WHOLE: tl.constexpr,  # one part
):
    """Grid: (S, Hkv, num_parts). One part of the KV of a sequence with at most BLOCK_M // GROUP queries."""
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1)
    part = tl.program_id(2)
    first_token = tl.load(query_start + sequence)
    length = tl.load(query_start + sequence + 1) - first_token
    if (length > 0) & (length <= BLOCK_M // GROUP):
        context = tl.load(context_lens + sequence)
        low = _lowest(context - length, window, WINDOWED)
        first, size = _share(low, context, num_parts, BLOCK_N, LEAST_TILES)
        begin = first + part * size
        end = tl.minimum(begin + size, context)
        if begin < end:
            row = tl.arange(0, BLOCK_M)
            component = tl.arange(0, HEAD)
            token = (first_token + row // GROUP).to(tl.int64)
            head = kv_head * GROUP + row % GROUP
            mine = row < length * GROUP
            held = mine[:, None] & (component < head_size)[None, :]
            at = token[:, None] * query_token + head[:, None] * query_head + component[None, :]
            top, mass, sums = sweep(
                tl.full([BLOCK_M], float("-inf"), tl.float32),
                tl.zeros([BLOCK_M], tl.float32),
                tl.zeros([BLOCK_M, HEAD], tl.float32),
                tl.load(query + at, mask=held, other=0.0),
                context - length + row // GROUP,
                keys + kv_head * head_stride,
                values + kv_head * head_stride,
                key_scales + kv_head * scale_head_stride if QUANTIZED else key_scales,
                value_scales + kv_head * scale_head_stride if QUANTIZED else value_scales,
                tables + sequence.to(tl.int64) * table_stride,
                block_stride,
                scale_block_stride,
                begin,
                end,
                low,
                context,
                window,
                scale,
                soft_cap,
                head_size,
                HEAD,
                BLOCK_SIZE,
                BLOCK_N,
                QUANTIZED,
                WINDOWED,
                CAPPED,
                True,
            )
            sums = sums / tl.where(mass == 0.0, 1.0, mass)[:, None]
            if WHOLE:
                to = (token[:, None] * num_heads + head[:, None]) * head_size + component[None, :]
                tl.store(out + to, sums.to(out.dtype.element_ty), mask=held)
            else:
                place = (sequence.to(tl.int64) * tl.num_programs(1) + kv_head) * num_parts + part
                to = (place * BLOCK_M + row)[:, None] * head_size + component[None, :]
                tl.store(part_sums + to, sums, mask=held)
                tl.store(part_mass + place * BLOCK_M + row, top + tl.log2(mass), mask=mine)


@triton.jit(do_not_specialize=["num_parts", "window"])
def _merge_parts(
    out,
    part_sums,
    part_mass,
    query_start,
    context_lens,
    num_parts,
    window,
    num_heads,
    head_size: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LEAST_TILES: tl.constexpr,
    WINDOWED: tl.constexpr,
    PARTS: tl.constexpr,  # num_parts, padded to a power of two
):
    """Grid: (S, Hkv, rows of a tile). One query's head from the parts of its KV; see _attend_parts."""
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1)
    row = tl.program_id(2)
    first_token = tl.load(query_start + sequence)
    length = tl.load(query_start + sequence + 1) - first_token
    if (row < length * GROUP) & (length <= BLOCK_M // GROUP):
        context = tl.load(context_lens + sequence)
        low = _lowest(context - length, window, WINDOWED)
        first, size = _share(low, context, num_parts, BLOCK_N, LEAST_TILES)
        part = tl.arange(0, PARTS)
        component = tl.arange(0, HEAD)
        written = part < tl.cdiv(context - first, size)
        place = (sequence.to(tl.int64) * tl.num_programs(1) + kv_head) * num_parts + part
        mass = tl.load(part_mass + place * BLOCK_M + row, mask=written, other=float("-inf"))
        top = tl.max(mass, axis=0)
        # A part that sees nothing of this query's window weighs 2 ** -infinity.
        weights = tl.exp2(mass - tl.where(top == float("-inf"), 0.0, top))
        held = written[:, None] & (component < head_size)[None, :]
        at = (place * BLOCK_M + row)[:, None] * head_size + component[None, :]
        sums = tl.sum(tl.load(part_sums + at, mask=held, other=0.0) * weights[:, None], axis=0)
        token = (first_token + row // GROUP).to(tl.int64)
        to = (token * num_heads + kv_head * GROUP + row % GROUP) * head_size + component
        result = sums / tl.sum(weights, axis=0)
        tl.store(out + to, result.to(out.dtype.element_ty), mask=component < head_size)


@triton.jit(do_not_specialize=["num_sequences", "fewest", "window"])
def _attend_tiles(
    out,  # [T, Hq, D], contiguous
    query,  # [T, Hq, D]
    keys,  # [NB, Hkv, BLOCK_SIZE, D]
    values,
    key_scales,  # [NB, Hkv, BLOCK_SIZE]
    value_scales,
    tables,  # [S, MB]
    query_start,  # [S + 1]
    context_lens,  # [S]
    num_sequences,
    fewest,  # queries of the rows computed here
    window,
    scale,
    soft_cap,
    query_token,
    query_head,
    block_stride,
    head_stride,
    scale_block_stride,
    scale_head_stride,
    table_stride,
    num_heads,
    head_size: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    QUANTIZED: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """Grid: (tiles, Hkv). The last tiles, which see the most KV, begin first."""
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = find_sequence(query_start, tile, num_sequences, BLOCK_Q)
    first_token = tl.load(query_start + sequence)
    length = tl.load(query_start + sequence + 1) - first_token
    first = (tile - first_token // BLOCK_Q - sequence) * BLOCK_Q  # query of the row
    if (length >= fewest) & (first < length):
        context = tl.load(context_lens + sequence)
        at_first = context - length + first  # position of the first query; the last is at high - 1
        high = tl.minimum(at_first + BLOCK_Q, context)
        row = tl.arange(0, BLOCK_M)
        component = tl.arange(0, HEAD)
        token = (first_token + first + row // GROUP).to(tl.int64)
        head = kv_head * GROUP + row % GROUP
        mine = (row < BLOCK_Q * GROUP) & (first + row // GROUP < length)
        held = mine[:, None] & (component < head_size)[None, :]
        at = token[:, None] * query_token + head[:, None] * query_head + component[None, :]
        queries = tl.load(query + at, mask=held, other=0.0)
        positions = at_first + row // GROUP
        low = _lowest(at_first, window, WINDOWED)
        begin = low // BLOCK_N * BLOCK_N
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        mass = tl.zeros([BLOCK_M], tl.float32)
        sums = tl.zeros([BLOCK_M, HEAD], tl.float32)
        keys += kv_head * head_stride
        values += kv_head * head_stride
        if QUANTIZED:
            key_scales += kv_head * scale_head_stride
            value_scales += kv_head * scale_head_stride
        table = tables + sequence.to(tl.int64) * table_stride
        if not WINDOWED:  # up to the diagonal nothing is hidden
            middle = (at_first + 1) // BLOCK_N * BLOCK_N
            top, mass, sums = sweep(
                top,
                mass,
                sums,
                queries,
                positions,
                keys,
                values,
                key_scales,
                value_scales,
                table,
                block_stride,
                scale_block_stride,
                begin,
                middle,
                low,
                high,
                window,
                scale,
                soft_cap,
                head_size,
                HEAD,
                BLOCK_SIZE,
                BLOCK_N,
                QUANTIZED,
                WINDOWED,
                CAPPED,
                False,
            )
            begin = middle
        top, mass, sums = sweep(
            top,
            mass,
            sums,
            queries,
            positions,
            keys,
            values,
            key_scales,
            value_scales,
            table,
            block_stride,
            scale_block_stride,
            begin,
            high,
            low,
            high,
            window,
            scale,
            soft_cap,
            head_size,
            HEAD,
            BLOCK_SIZE,
            BLOCK_N,
            QUANTIZED,
            WINDOWED,
            CAPPED,
            True,
        )
        to = (token[:, None] * num_heads + head[:, None]) * head_size + component[None, :]
        tl.store(out + to, (sums / mass[:, None]).to(out.dtype.element_ty), mask=held)


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
    if query.numel() == 0:
        return out
    if key_cache.stride() != value_cache.stride():
        raise ValueError(f"Key and value caches differ in strides: {key_cache.stride()}, {value_cache.stride()}.")
    query = query if query.stride(2) == 1 else query.contiguous()
    call = _describe(query, key_cache, value_cache, batch, scale, window, soft_cap)
    decode = _tile("decode", query.itemsize, call.head, call.group, query.device)
    few = decode.block_m // call.group
    _decode(out, call, batch, decode, min(few, batch.max_query_len))
    if batch.max_query_len > few:
        _prefill(out, call, few + 1, _tile("prefill", query.itemsize, call.head, call.group, query.device))
    return out


@dataclass(frozen=True, slots=True)
class _Call:
    """What both kernels are told, in the order of their parameters: tensors, then numbers, then the form that they are
    compiled for."""

    tensors: tuple[torch.Tensor | None, ...]
    numbers: tuple[float, ...]
    form: dict[str, int]
    num_sequences: int
    num_kv_heads: int
    group: int
    head: int  # padded size
    window: int | None


def _describe(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> _Call:
    keys, key_scales = split_cache(key_cache)
    values, value_scales = split_cache(value_cache)
    (num_heads, head_size), num_kv_heads = query.shape[1:], keys.shape[1]
    group, head = num_heads // num_kv_heads, max(16, triton.next_power_of_2(head_size))
    return _Call(
        tensors=(
            query,
            keys,
            values,
            key_scales,
            value_scales,
            batch.block_tables,
            batch.query_start,
            batch.context_lens,
        ),
        numbers=(
            0 if window is None else window,
            scale * LOG2_E if soft_cap is None else scale,
            1.0 if soft_cap is None else soft_cap,
            *query.stride()[:2],
            *keys.stride()[:2],
            *((0, 0) if key_scales is None else key_scales.stride()[:2]),
            batch.block_tables.stride(0),
            num_heads,
            head_size,
        ),
        form={
            "GROUP": group,
            "HEAD": head,
            "BLOCK_SIZE": keys.shape[2],
            "QUANTIZED": key_scales is not None,
            "WINDOWED": window is not None,
            "CAPPED": soft_cap is not None,
        },
        num_sequences=len(batch.context_lens),
        num_kv_heads=num_kv_heads,
        group=group,
        head=head,
        window=window,
    )


def _decode(out: torch.Tensor, call: _Call, batch: AttentionBatch, tile: AttentionTile, most_queries: int) -> None:
    """Rows of at most most_queries queries."""
    longest = min(batch.max_context_len, batch.block_tables.shape[1] * call.form["BLOCK_SIZE"])
    if call.window is not None:
        longest = min(longest, call.window + most_queries + tile.block_n)
    parts = _num_parts(call.num_sequences * call.num_kv_heads, longest, tile, out.device)
    shape = (call.num_sequences, call.num_kv_heads, parts, tile.block_m)
    sums = mass = None
    if parts > 1:
        sums = torch.empty((*shape, out.shape[2]), dtype=torch.float32, device=out.device)
        mass = torch.empty(shape, dtype=torch.float32, device=out.device)
    cut = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "LEAST_TILES": LEAST_TILES}
    _attend_parts[shape[:3]](
        out,
        sums,
        mass,
        *call.tensors,
        parts,
        *call.numbers,
        **call.form,
        **cut,
        WHOLE=parts == 1,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if parts > 1:
        _merge_parts[(*shape[:2], most_queries * call.group)](
            out,
            sums,
            mass,
            batch.query_start,
            batch.context_lens,
            parts,
            call.numbers[0],
            *out.shape[1:],
            GROUP=call.group,
            HEAD=call.head,
            **cut,
            WINDOWED=call.window is not None,
            PARTS=triton.next_power_of_2(parts),
            num_warps=4,
        )


def _prefill(out: torch.Tensor, call: _Call, fewest: int, tile: AttentionTile) -> None:
    """Rows of at least `fewest` queries."""
    tiles = len(out) // (tile.block_m // call.group) + call.num_sequences
    _attend_tiles[(tiles, call.num_kv_heads)](
        out,
        *call.tensors,
        call.num_sequences,
        fewest,
        *call.numbers,
        **call.form,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


@cache
def _tile(kernel: str, size: int, head: int, group: int, device: torch.device) -> AttentionTile:
    """The table's for elements of `size` bytes and this padded head size, its rows at least a group."""
    found = attention_tile(f"{kernel} {size}", head, device)
    return found if group <= found.block_m else replace(found, block_m=triton.next_power_of_2(group))


@lru_cache(1 << 14)
def _num_parts(programs: int, longest: int, tile: AttentionTile, device: torch.device) -> int:
    """Parts of each sequence's KV: a power of two, so that few kernels are compiled."""
    wanted = -(-processors(device) * tile.programs // programs)
    possible = max(1, longest // (LEAST_TILES * tile.block_n))
    return min(triton.next_power_of_2(wanted), triton.next_power_of_2(possible), MOST_PARTS)

"""The reference ops against naive loops written straight from the contract."""

import math
import random

import pytest
import torch

from octavo.kernels import ref
from octavo.kernels.ops import AttentionBatch, select


def make_batch(rows, block_size, num_blocks, seed=0):
    """rows: (context, query length) each. Block tables are scrambled; the last row's KV is not written."""
    order = list(range(num_blocks))
    random.Random(seed).shuffle(order)
    width = max(-(-context // block_size) for context, _ in rows) + 1
    tables = torch.zeros(len(rows), width, dtype=torch.int32)
    slots = []
    for s, (context, length) in enumerate(rows):
        for column in range(-(-context // block_size)):
            tables[s, column] = order.pop()
        positions = range(context - length, context)
        slots += [int(tables[s, p // block_size]) * block_size + p % block_size for p in positions]
    starts = torch.tensor([0] + [length for _, length in rows]).cumsum(0).to(torch.int32)
    return AttentionBatch(
        block_tables=tables,
        query_start=starts,
        context_lens=torch.tensor([context for context, _ in rows], dtype=torch.int32),
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        max_query_len=max(length for _, length in rows),
        max_context_len=max(context for context, _ in rows),
    )


def naive_attention(query, key_cache, value_cache, batch, scale, window, soft_cap):
    """One query head and one position at a time, in float64."""
    out = torch.zeros_like(query, dtype=torch.float64)
    block_size = key_cache.shape[2]
    group = query.shape[1] // key_cache.shape[1]
    for s in range(len(batch.context_lens)):
        start, end = int(batch.query_start[s]), int(batch.query_start[s + 1])
        context = int(batch.context_lens[s])
        for t in range(start, end):
            p = context - (end - t)
            seen = [i for i in range(p + 1) if window is None or i > p - window]
            where = [(int(batch.block_tables[s, i // block_size]), i % block_size) for i in seen]
            for h in range(query.shape[1]):
                keys = torch.stack([key_cache[b, h // group, o] for b, o in where]).double()
                values = torch.stack([value_cache[b, h // group, o] for b, o in where]).double()
                scores = keys @ query[t, h].double() * scale
                if soft_cap is not None:
                    scores = soft_cap * torch.tanh(scores / soft_cap)
                out[t, h] = torch.softmax(scores, 0) @ values
    return out


ROWS = {
    "decode": [(1, 1), (17, 1), (8, 1), (33, 1)],
    "prefill": [(5, 5), (24, 24)],
    "mixed": [(9, 1), (20, 7), (16, 16), (1, 1), (2, 2)],
    "one-token prefill": [(1, 1)],
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (1, None), (8, None), (11, 5.0), (None, 2.0)])
def test_paged_attention(rows, heads, kv_heads, window, soft_cap, monkeypatch):
    monkeypatch.setattr("octavo.kernels.ref.attention.MAX_GATHERED", 2000)  # more than one slice of rows
    monkeypatch.setattr("octavo.kernels.ref.attention.MAX_QUERY_SLICE", 10)
    torch.manual_seed(0)
    batch = make_batch(rows, 8, 32)
    query = torch.randn(len(batch.slot_mapping), heads, 16)
    key_cache, value_cache = torch.randn(2, 32, kv_heads, 8, 16).unbind(0)
    got = ref.paged_attention(query, key_cache, value_cache, batch, 0.3, window, soft_cap)
    want = naive_attention(query, key_cache, value_cache, batch, 0.3, window, soft_cap)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_attention_reads_only_its_own_slots(rows):
    """Slots outside of the visible contexts may hold NaN."""
    batch = make_batch(rows, 8, 32)
    torch.manual_seed(0)
    key_cache, value_cache = torch.full((2, 32, 2, 8, 16), math.nan).unbind(0)
    for s, context in enumerate(batch.context_lens.tolist()):
        for p in range(context):
            block = int(batch.block_tables[s, p // 8])
            key_cache[block, :, p % 8], value_cache[block, :, p % 8] = torch.randn(2, 2, 16)
    query = torch.randn(len(batch.slot_mapping), 4, 16)
    for window in (None, 6):
        assert ref.paged_attention(query, key_cache, value_cache, batch, 0.3, window).isfinite().all()


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_row_attention_sees_all_of_its_row_and_nothing_else(kv_heads, monkeypatch):
    monkeypatch.setattr("octavo.kernels.ref.attention.MAX_QUERY_SLICE", 3)
    starts = torch.tensor([0, 5, 6, 14], dtype=torch.int32)
    batch = AttentionBatch(None, starts, None, None, 8, 8)
    query, key, value = (torch.randn(14, heads, 16, dtype=torch.float64).float() for heads in (4, kv_heads, kv_heads))
    found = ref.row_attention(query, key, value, batch, 0.3)
    for start, end in ((0, 5), (5, 6), (6, 14)):
        for head in range(4):
            keys, values = (x[start:end, head * kv_heads // 4] for x in (key, value))
            weights = torch.softmax(query[start:end, head] @ keys.T * 0.3, dim=-1)
            torch.testing.assert_close(found[start:end, head], weights @ values, rtol=1e-5, atol=1e-6)


def test_low_precision_keeps_its_dtype():
    batch = make_batch(ROWS["mixed"], 8, 32)
    query = torch.randn(len(batch.slot_mapping), 4, 16)
    caches = torch.randn(2, 32, 2, 8, 16)
    exact = ref.paged_attention(query, caches[0], caches[1], batch, 0.3)
    key_cache, value_cache = caches.bfloat16().unbind(0)
    got = ref.paged_attention(query.bfloat16(), key_cache, value_cache, batch, 0.3)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), exact, atol=0.05, rtol=0.05)


def test_write_kv_skips_minus_one():
    key, value = torch.randn(2, 4, 2, 16).unbind(0)
    key_cache, value_cache = torch.zeros(2, 3, 2, 8, 16).unbind(0)
    ref.write_kv(key, value, key_cache, value_cache, torch.tensor([17, -1, 0, 9]))
    want = torch.zeros_like(key_cache)
    want[2, :, 1], want[0, :, 0], want[1, :, 1] = key[0], key[2], key[3]
    torch.testing.assert_close(key_cache, want, atol=0, rtol=0)
    assert torch.equal(value_cache[2, :, 1], value[0])
    assert value_cache.abs().sum() == value[[0, 2, 3]].abs().sum()


def test_copy_blocks():
    key_cache, value_cache = torch.randn(2, 5, 2, 8, 4).unbind(0)
    before = key_cache.clone(), value_cache.clone()
    ref.copy_blocks(key_cache, value_cache, torch.tensor([[0, 3], [2, 4]]))
    assert torch.equal(key_cache[[3, 4]], before[0][[0, 2]])
    assert torch.equal(value_cache[[3, 4]], before[1][[0, 2]])
    assert torch.equal(key_cache[:3], before[0][:3])


@pytest.mark.parametrize("rotated", [16, 8])
def test_rotary_is_a_rotation_by_position(rotated):
    torch.manual_seed(0)
    query, key = torch.randn(3, 4, 16), torch.randn(3, 2, 16)
    angle = torch.randn(10, rotated // 2)
    positions = torch.tensor([7, 0, 9])
    got_query, got_key = ref.rotary(query.clone(), key.clone(), positions, torch.cat((angle.cos(), angle.sin()), dim=1))
    for x, got in ((query, got_query), (key, got_key)):
        want = x.clone()
        for t, p in enumerate(positions.tolist()):
            for i in range(rotated // 2):
                j = i + rotated // 2
                z = torch.complex(x[t, :, i], x[t, :, j]) * torch.polar(torch.tensor(1.0), angle[p, i])
                want[t, :, i], want[t, :, j] = z.real, z.imag
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


def test_norms_and_activations():
    torch.manual_seed(0)
    x, residual, weight = torch.randn(5, 16), torch.randn(5, 16), torch.randn(16)
    total = x + residual
    want = total / (total.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    normed, got_total = ref.add_rms_norm(x.clone(), residual.clone(), weight, 1e-5)
    torch.testing.assert_close(got_total, total)
    torch.testing.assert_close(normed, want)
    torch.testing.assert_close(ref.rms_norm(total, weight, 1e-5), want)
    assert ref.rms_norm(total.bfloat16(), weight, 1e-5).dtype == torch.bfloat16
    gate, up = x.chunk(2, -1)
    torch.testing.assert_close(ref.silu_and_mul(x.clone()), gate * torch.sigmoid(gate) * up)
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    torch.testing.assert_close(ref.gelu_tanh_and_mul(x.clone()), 0.5 * gate * (1 + inner.tanh()) * up)


def test_select_takes_ref_when_forced():
    ops = select(torch.device("cpu"), torch.float32, force="ref")
    assert {body for _, body in ops.bodies} == {"ref"}
    assert ops.paged_attention is ref.paged_attention

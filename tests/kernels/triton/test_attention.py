"""Paged attention and the KV cache in Triton against `ref`; without a GPU in Triton's interpreter.

Tolerances: see test_rows. Weights are rounded to the query's type before they meet the values, as in every attention
that uses matrix units.
"""

import pytest
import torch

from octavo.kernels import ref, triton
from octavo.kernels.ops import AttentionBatch
from octavo.kernels.ref.cache import scaled_parts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
Q8 = (torch.int8, torch.float8_e4m3fn)

# In the interpreter: rows of a tile that are no query's divide nothing by nothing, and are not stored.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def make_batch(rows: list[tuple[int, int]], block_size: int, spare: int = 3) -> tuple[AttentionBatch, int]:
    """rows: (query length, context length). A batch with shuffled blocks, and the pool's number of blocks."""
    counts = [-(-context // block_size) for _, context in rows]
    order = torch.randperm(sum(counts) + spare, dtype=torch.int32)
    tables = torch.zeros((len(rows), max(counts) + 2), dtype=torch.int32)[:, :-1]  # a view wider than its rows
    slots: list[int] = []
    for s, (length, context) in enumerate(rows):
        tables[s, : counts[s]], order = order[: counts[s]], order[counts[s] :]
        positions = range(context - length, context)
        slots += [int(tables[s, p // block_size]) * block_size + p % block_size for p in positions]
    lengths = torch.tensor([0] + [length for length, _ in rows])
    batch = AttentionBatch(
        block_tables=tables.to(DEVICE),
        query_start=lengths.cumsum(0).to(torch.int32).to(DEVICE),
        context_lens=torch.tensor([context for _, context in rows], dtype=torch.int32, device=DEVICE),
        slot_mapping=torch.tensor(slots, dtype=torch.int64, device=DEVICE),
        max_query_len=max(length for length, _ in rows),
        max_context_len=max(context for _, context in rows),
    )
    return batch, sum(counts) + spare


Attention = tuple[torch.Tensor, torch.Tensor, torch.Tensor, AttentionBatch]


def make_attention(
    rows: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    head_size: int,
    block_size: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
) -> Attention:
    """The query is a slice of a fused projection; slots no sequence holds are NaN."""
    batch, num_blocks = make_batch(rows, block_size)
    num_tokens = sum(length for length, _ in rows)
    fused = torch.randn(num_tokens, (heads + 2 * kv_heads) * head_size, device=DEVICE).to(dtype)
    query = fused[:, : heads * head_size].view(num_tokens, heads, head_size)
    rows_of_kv = torch.randn(2, num_blocks * block_size, kv_heads, head_size, device=DEVICE)
    held = torch.zeros(num_blocks * block_size, dtype=torch.bool)
    for s, (_, context) in enumerate(rows):
        for p in range(context):
            held[int(batch.block_tables[s, p // block_size]) * block_size + p % block_size] = True
    rows_of_kv[:, ~held] = float("nan")
    row_size = head_size + (4 if kv_dtype in Q8 else 0)
    caches = torch.empty(2, num_blocks, kv_heads, block_size, row_size, dtype=kv_dtype, device=DEVICE)
    slots = torch.arange(num_blocks * block_size, device=DEVICE)
    ref.write_kv(rows_of_kv[0], rows_of_kv[1], caches[0], caches[1], slots)
    return query, caches[0], caches[1], batch


ATTENTION = {
    # rows of (query, context); heads, kv heads, head size, block size; window, soft cap
    "one token": ([(1, 1)], 1, 1, 64, 16, None, None),
    "a decode batch": ([(1, 5), (1, 16), (1, 17), (1, 130)], 6, 2, 64, 16, None, None),
    "one whole block": ([(16, 16)], 4, 2, 64, 16, None, None),
    "a prompt": ([(70, 70)], 3, 1, 64, 16, None, None),
    "a chunk after a prefix": ([(33, 100)], 2, 2, 64, 16, None, None),
    "a mixed step": ([(1, 40), (37, 37), (1, 1), (6, 64), (2, 130), (9, 9)], 6, 2, 80, 32, None, None),
    "drafts": ([(4, 40), (1, 37), (3, 3), (2, 600)], 8, 2, 64, 16, None, None),
    "two queries and a window": ([(2, 90)], 4, 1, 64, 16, 7, None),
    "one KV head": ([(1, 77), (20, 77)], 12, 1, 128, 16, None, None),
    "more than 16 per group": ([(1, 40), (3, 35)], 20, 1, 64, 16, None, None),
    "no grouping": ([(1, 77), (20, 77)], 1, 1, 96, 64, None, None),
    "seven per group": ([(1, 65), (9, 65)], 7, 1, 112, 128, None, None),
    "head size 256": ([(1, 33), (40, 70)], 2, 1, 256, 16, None, None),
    "head size 72": ([(1, 33), (20, 40)], 2, 1, 72, 24, None, None),
    "head size 8": ([(1, 33), (20, 40)], 1, 1, 8, 8, None, None),
    "decode with a window": ([(1, 500), (1, 3), (1, 64)], 4, 2, 64, 16, 300, None),
    "prefill with a window": ([(90, 140)], 2, 1, 64, 16, 16, None),
    "a window of one": ([(1, 30), (20, 30)], 2, 1, 64, 16, 1, None),
    "a soft cap": ([(1, 100), (40, 60)], 2, 1, 64, 16, None, 2.0),
    "a window and a soft cap": ([(1, 150), (90, 150)], 2, 1, 64, 32, 32, 5.0),
    "a long context, split": ([(1, 2100), (1, 300), (1, 10)], 3, 1, 64, 16, None, None),
    "few queries, long context": ([(24, 1000)], 2, 1, 64, 128, None, None),
}


def check(case: str, dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    *shape, window, soft_cap = ATTENTION[case]
    made = make_attention(*shape, dtype, kv_dtype)
    arguments = (*made, shape[3] ** -0.5, window, soft_cap)
    close(triton.paged_attention(*arguments), ref.paged_attention(*arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("case", ATTENTION)
def test_paged_attention(case: str, dtype: torch.dtype) -> None:
    check(case, dtype, dtype)


@pytest.mark.parametrize("kv_dtype", Q8, ids=name)
@pytest.mark.parametrize("case", ["a mixed step", "a window and a soft cap", "a long context, split", "head size 72"])
def test_paged_attention_over_8_bits(case: str, kv_dtype: torch.dtype) -> None:
    check(case, torch.bfloat16, kv_dtype)


@pytest.mark.parametrize("case", ["a mixed step", "a prompt"])
def test_paged_attention_in_other_types(case: str) -> None:
    check(case, torch.float16, torch.float16)
    check(case, torch.float32, torch.bfloat16)
    check(case, torch.float32, torch.int8)


def test_paged_attention_of_a_padded_step() -> None:
    """As a CUDA graph has it: maxima that are bounds, rows without queries at the end, tokens of no row."""
    rows = [(1, 40), (6, 64), (2, 130)]
    query, key_cache, value_cache, batch = make_attention(rows, 4, 2, 64, 16, torch.float32, torch.float32)
    padded = AttentionBatch(
        block_tables=torch.nn.functional.pad(batch.block_tables, (0, 30, 0, 2)),
        query_start=torch.nn.functional.pad(batch.query_start, (0, 2), value=9),
        context_lens=torch.nn.functional.pad(batch.context_lens, (0, 2), value=1),
        slot_mapping=batch.slot_mapping,
        max_query_len=16,
        max_context_len=(1 << 31) - 1,
    )
    found = triton.paged_attention(query.repeat(2, 1, 1), key_cache, value_cache, padded, 0.125)
    close(found[:9], ref.paged_attention(query, key_cache, value_cache, batch, 0.125))


def test_paged_attention_survives_large_scores() -> None:
    query, *rest = make_attention([(1, 70), (30, 70)], 2, 1, 64, 16, torch.float32, torch.float32)
    close(triton.paged_attention(query * 100, *rest, 1.0), ref.paged_attention(query * 100, *rest, 1.0))


def test_paged_attention_with_a_query_of_another_layout() -> None:
    query, *rest = make_attention([(1, 9), (6, 20)], 4, 2, 64, 16, torch.float32, torch.float32)
    expected = ref.paged_attention(query, *rest, 0.125)
    for order in ((0, 1), (1, 2)):
        close(triton.paged_attention(query.transpose(*order).contiguous().transpose(*order), *rest, 0.125), expected)


@pytest.mark.parametrize("lengths", [(1,), (7, 7, 7), (1, 20, 64, 3, 70)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("head_size", [32, 80])
def test_row_attention(head_size: int, dtype: torch.dtype, lengths: tuple[int, ...]) -> None:
    """Equal to ref, and bit for bit what a row gives alone."""
    batch, _ = make_batch([(length, length) for length in lengths], block_size=16)
    fused = torch.randn(sum(lengths), 4 + 2 + 2, head_size, device=DEVICE).to(dtype)
    query, key, value = fused.split((4, 2, 2), dim=1)
    found = triton.row_attention(query, key, value, batch, 0.2)
    close(found, ref.row_attention(query, key, value, batch, 0.2))
    alone, _ = make_batch([(lengths[-1], lengths[-1])], block_size=16)
    last = (x[-lengths[-1] :] for x in (query, key, value))
    assert torch.equal(found[-lengths[-1] :], triton.row_attention(*last, alone, 0.2))


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16, *Q8], ids=name)
@pytest.mark.parametrize(("kv_heads", "head_size", "block_size"), [(3, 64, 16), (1, 80, 128), (2, 12, 24)])
def test_write_kv(kv_dtype: torch.dtype, kv_heads: int, head_size: int, block_size: int) -> None:
    dtype, num_tokens, num_blocks = torch.bfloat16, 20, 5 + 20 // block_size
    fused = (torch.randn(num_tokens, 3 * kv_heads * head_size) * torch.rand(num_tokens, 1).pow(9)).to(DEVICE, dtype)
    _, key, value = fused.view(num_tokens, 3, kv_heads, head_size).unbind(1)
    slots = torch.randperm(num_blocks * block_size)[:num_tokens].to(DEVICE)
    slots[::7] = -1
    row_size = head_size + (4 if kv_dtype in Q8 else 0)
    shape = (2, num_blocks, kv_heads, block_size, row_size)
    actual, expected = (torch.zeros(shape, dtype=kv_dtype, device=DEVICE) for _ in range(2))
    triton.write_kv(key, value, actual[0], actual[1], slots)
    ref.write_kv(key, value, expected[0], expected[1], slots)
    assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))
    triton.write_kv(key[:0], value[:0], actual[0], actual[1], slots[:0])
    assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("kv_dtype", Q8, ids=name)
def test_write_kv_rounds(kv_dtype: torch.dtype) -> None:
    """Halves go to the even neighbour; nothing, and what is too small to divide by, become 0; NaN and infinity NaN."""
    rows = torch.zeros(7, 1, 8)
    rows[0, 0] = torch.tensor([127.0, 0.5, 1.5, -0.5, -1.5, 2.5, -126.4, -127.0])
    rows[1, 0, 3] = -1e-3
    rows[3, 0, 1] = 1e-42
    rows[4, 0, 7], rows[5, 0, 0], rows[6, 0, 2] = float("inf"), float("nan"), float("-inf")
    rows = rows.to(DEVICE)
    actual, expected = (torch.zeros(2, 1, 1, 8, 12, dtype=kv_dtype, device=DEVICE) for _ in range(2))
    triton.write_kv(rows, -rows, actual[0], actual[1], torch.arange(7, device=DEVICE))
    ref.write_kv(rows, -rows, expected[0], expected[1], torch.arange(7, device=DEVICE))
    for cache, wanted in zip(actual, expected, strict=True):
        (values, scales), (wanted_values, wanted_scales) = scaled_parts(cache), scaled_parts(wanted)
        assert torch.equal(values.float(), wanted_values.float())
        torch.testing.assert_close(scales, wanted_scales, rtol=0, atol=0, equal_nan=True)


def test_write_kv_takes_keys_of_another_layout() -> None:
    key, value = torch.randn(2, 6, 64, 2, device=DEVICE).transpose(2, 3)
    actual, expected = (torch.zeros(2, 2, 2, 8, 64, device=DEVICE) for _ in range(2))
    slots = torch.tensor([0, 15, -1, 7, 8, 3], device=DEVICE)
    triton.write_kv(key, value, actual[0], actual[1], slots)
    ref.write_kv(key, value, expected[0], expected[1], slots)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("pairs", [[(0, 5), (0, 4), (1, 7)], [(i, 39 - i) for i in range(10)], []], ids=len)
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16, *Q8], ids=name)
def test_copy_blocks(kv_dtype: torch.dtype, pairs: list[tuple[int, int]]) -> None:
    caches = torch.randn(2, 40, 3, 16, 100, device=DEVICE).to(kv_dtype)
    expected, moves = caches.clone(), torch.tensor(pairs, dtype=torch.int64, device=DEVICE).view(-1, 2)
    triton.copy_blocks(caches[0], caches[1], moves)
    ref.copy_blocks(expected[0], expected[1], moves)
    assert torch.equal(caches.view(torch.uint8), expected.view(torch.uint8))

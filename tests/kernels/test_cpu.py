"""The CPU libraries against `ref`: every op × every instruction set of this machine × dtype, random and edge shapes.

Tolerances. float32: 2e-5, absolute and relative, for sums of up to a few hundred terms of order 1. bfloat16: 2 units of
its 8 bits (1.6e-2 relative), since `ref` rounds where a fused body does not. Copies are exact.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from octavo.kernels import cpu, ops, ref
from octavo.kernels.cpu.library import ISAS, cpu_flags, runnable
from octavo.kernels.ops import AttentionBatch
from octavo.kernels.ref.cache import scaled_parts

DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2}

pytestmark = pytest.mark.skipif(not runnable(), reason="no CPU library was built")


@pytest.fixture(params=list(runnable()) or ["none"])
def body(request: pytest.FixtureRequest) -> cpu.Body:
    loaded = cpu.load(request.param)
    assert loaded is not None
    assert loaded.isa == request.param
    return loaded


@pytest.fixture(params=DTYPES, ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Two threads, whatever the environment says, so that sharing work is tested too."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def make_batch(rows: list[tuple[int, int]], block_size: int, spare: int = 3) -> tuple[AttentionBatch, int]:
    """rows: (query length, context length). Returns a batch with shuffled blocks, and the pool's number of blocks."""
    counts = [-(-context // block_size) for _, context in rows]
    num_blocks = sum(counts) + spare
    order = torch.randperm(num_blocks, dtype=torch.int32)
    tables = torch.zeros((len(rows), max(counts, default=0) + 2), dtype=torch.int32)[
        :, :-1
    ]  # a view wider than its rows
    slots: list[int] = []
    for s, (length, context) in enumerate(rows):
        tables[s, : counts[s]], order = order[: counts[s]], order[counts[s] :]
        slots += [
            int(tables[s, position // block_size]) * block_size + position % block_size
            for position in range(context - length, context)
        ]
    lengths = torch.tensor([0] + [length for length, _ in rows])
    batch = AttentionBatch(
        block_tables=tables,
        query_start=lengths.cumsum(0).to(torch.int32),
        context_lens=torch.tensor([context for _, context in rows], dtype=torch.int32),
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        max_query_len=max((length for length, _ in rows), default=0),
        max_context_len=max((context for _, context in rows), default=0),
    )
    return batch, num_blocks


def make_attention(
    rows: list[tuple[int, int]], heads: int, kv_heads: int, head_size: int, block_size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, AttentionBatch]:
    """The query is a slice of a fused projection; slots no sequence holds are NaN."""
    batch, num_blocks = make_batch(rows, block_size)
    num_tokens = sum(length for length, _ in rows)
    fused = torch.randn(num_tokens, (heads + 2 * kv_heads) * head_size).to(dtype)
    query = fused[:, : heads * head_size].view(num_tokens, heads, head_size)
    caches = [torch.full((num_blocks, kv_heads, block_size, head_size), float("nan"), dtype=dtype) for _ in range(2)]
    for s, (_, context) in enumerate(rows):
        for position in range(context):
            block = int(batch.block_tables[s, position // block_size])
            for cache in caches:
                cache[block, :, position % block_size] = torch.randn(kv_heads, head_size).to(dtype)
    return query, caches[0], caches[1], batch


ATTENTION = {
    # rows of (query, context); heads, kv heads, head size, block size; window, soft cap
    "one token": ([(1, 1)], 1, 1, 64, 16, None, None),
    "a decode batch": ([(1, 5), (1, 16), (1, 17), (1, 130)], 9, 3, 64, 16, None, None),
    "one whole block": ([(8, 8)], 4, 2, 64, 8, None, None),
    "a prompt": ([(70, 70)], 9, 3, 64, 16, None, None),
    "a chunk after a prefix": ([(33, 100)], 4, 4, 64, 16, None, None),
    "a mixed step": ([(1, 40), (37, 37), (1, 1), (5, 64), (2, 130)], 6, 2, 80, 32, None, None),
    "two queries and a window": ([(2, 90)], 4, 1, 64, 16, 7, None),
    "one KV head": ([(1, 77), (20, 77)], 12, 1, 128, 16, None, None),
    "no grouping": ([(1, 77), (3, 77)], 2, 2, 96, 64, None, None),
    "seven per group": ([(1, 65), (9, 65)], 7, 1, 128, 128, None, None),
    "head size 256": ([(1, 33), (40, 70)], 4, 2, 256, 16, None, None),
    "head size 72": ([(1, 33), (20, 40)], 4, 2, 72, 24, None, None),
    "head size 8": ([(1, 33), (20, 40)], 2, 2, 8, 8, None, None),
    "decode with a window": ([(1, 200), (1, 3), (1, 64)], 4, 2, 64, 16, 64, None),
    "prefill with a window": ([(150, 200)], 2, 1, 64, 16, 16, None),
    "a window of one": ([(1, 30), (20, 30)], 2, 1, 64, 16, 1, None),
    "a soft cap": ([(1, 100), (40, 60)], 4, 2, 64, 16, None, 2.0),
    "a window and a soft cap": ([(1, 150), (90, 150)], 4, 2, 64, 16, 32, 5.0),
    "a long context, split": ([(1, 2100)], 9, 3, 64, 16, None, None),
    "few queries, long context, split": ([(24, 1500)], 4, 1, 64, 128, None, None),
}


@pytest.mark.parametrize("case", ATTENTION)
def test_paged_attention(body: cpu.Body, dtype: torch.dtype, case: str) -> None:
    rows, heads, kv_heads, head_size, block_size, window, soft_cap = ATTENTION[case]
    query, key_cache, value_cache, batch = make_attention(rows, heads, kv_heads, head_size, block_size, dtype)
    arguments = (query, key_cache, value_cache, batch, head_size**-0.5, window, soft_cap)
    actual = body.paged_attention(*arguments)
    close(actual, ref.paged_attention(*arguments))
    assert torch.equal(actual, body.paged_attention(*arguments)), "not the same bits twice"


@pytest.mark.parametrize("lengths", [(1,), (7, 7, 7), (1, 40, 40, 3, 130), (600,)], ids=str)
@pytest.mark.parametrize("heads", [(12, 12), (8, 2)], ids=["mha", "gqa"])
def test_row_attention(body: cpu.Body, dtype: torch.dtype, heads: tuple[int, int], lengths: tuple[int, ...]) -> None:
    """Equal to ref, and bit for bit what a row gives alone."""
    count, kv_count = heads
    batch, _ = make_batch([(length, length) for length in lengths], block_size=16)
    fused = torch.randn(sum(lengths), (count + 2 * kv_count), 32).to(dtype)
    query, key, value = fused.split((count, kv_count, kv_count), dim=1)
    found = body.row_attention(query, key, value, batch, 32**-0.5)
    close(found, ref.row_attention(query, key, value, batch, 32**-0.5))
    end = 0
    for length in lengths:
        start, end = end, end + length
        alone, _ = make_batch([(length, length)], block_size=16)
        parts = (x[start:end] for x in (query, key, value))
        assert torch.equal(found[start:end], body.row_attention(*parts, alone, 32**-0.5))


def test_paged_attention_survives_large_scores(body: cpu.Body, dtype: torch.dtype) -> None:
    query, key_cache, value_cache, batch = make_attention([(1, 70), (30, 70)], 2, 1, 64, 16, dtype)
    arguments = (query * 100, key_cache, value_cache, batch, 1.0)
    close(body.paged_attention(*arguments), ref.paged_attention(*arguments))


def test_paged_attention_of_an_empty_step(body: cpu.Body, dtype: torch.dtype) -> None:
    query, key_cache, value_cache, batch = make_attention([], 4, 2, 64, 16, dtype)
    assert body.paged_attention(query, key_cache, value_cache, batch, 1.0).shape == (0, 4, 64)


def test_paged_attention_with_a_query_of_another_layout(body: cpu.Body, dtype: torch.dtype) -> None:
    query, key_cache, value_cache, batch = make_attention([(1, 9), (3, 20)], 4, 2, 64, 16, dtype)
    expected = ref.paged_attention(query, key_cache, value_cache, batch, 0.125)
    by_head = query.transpose(0, 1).contiguous().transpose(0, 1)
    by_component = query.transpose(1, 2).contiguous().transpose(1, 2)
    close(body.paged_attention(by_head, key_cache, value_cache, batch, 0.125), expected)
    close(body.paged_attention(by_component, key_cache, value_cache, batch, 0.125), expected)


def test_paged_attention_with_a_bfloat16_cache_and_float32_queries(body: cpu.Body) -> None:
    query, key_cache, value_cache, batch = make_attention([(1, 50), (20, 50)], 4, 2, 64, 16, torch.bfloat16)
    arguments = (query.float(), key_cache, value_cache, batch, 0.125)
    close(body.paged_attention(*arguments), ref.paged_attention(*arguments))


def to_int8(cache: torch.Tensor) -> torch.Tensor:
    """The cache as int8 with scales; slots that were NaN keep a scale that is."""
    num_blocks, kv_heads, block_size, head_size = cache.shape
    made = torch.empty(num_blocks, kv_heads, block_size, head_size + 4, dtype=torch.int8)
    rows = cache.transpose(1, 2).reshape(-1, kv_heads, head_size)
    ref.write_kv(rows, rows, made, made, torch.arange(len(rows)))
    return made


@pytest.mark.parametrize("case", ATTENTION)
def test_paged_attention_with_an_int8_cache(body: cpu.Body, dtype: torch.dtype, case: str) -> None:
    rows, heads, kv_heads, head_size, block_size, window, soft_cap = ATTENTION[case]
    query, key_cache, value_cache, batch = make_attention(rows, heads, kv_heads, head_size, block_size, dtype)
    arguments = (query, to_int8(key_cache), to_int8(value_cache), batch, head_size**-0.5, window, soft_cap)
    actual = body.paged_attention(*arguments)
    close(actual, ref.paged_attention(*arguments))
    exact = ref.paged_attention(query, key_cache, value_cache, *arguments[3:])
    assert (actual - exact).abs().max() < 0.05, "rounded to 8 bits, not to fewer"


@pytest.mark.parametrize(("kv_heads", "head_size", "block_size"), [(3, 64, 16), (1, 80, 8), (2, 72, 128), (2, 12, 24)])
@pytest.mark.parametrize("cache_dtype", [*DTYPES, torch.int8], ids=["float32", "bfloat16", "int8"])
def test_write_kv(
    body: cpu.Body, dtype: torch.dtype, cache_dtype: torch.dtype, kv_heads: int, head_size: int, block_size: int
) -> None:
    num_tokens, num_blocks = 700, 5 + 700 // block_size
    fused = (torch.randn(num_tokens, 3 * kv_heads * head_size) * torch.rand(num_tokens, 1).pow(9)).to(dtype)
    _, key, value = fused.view(num_tokens, 3, kv_heads, head_size).unbind(1)
    slots = torch.randperm(num_blocks * block_size)[:num_tokens]
    slots[::7] = -1
    row_size = head_size + (4 if cache_dtype == torch.int8 else 0)
    shape = (2, num_blocks, kv_heads, block_size, row_size)
    actual, expected = torch.zeros(shape, dtype=cache_dtype), torch.zeros(shape, dtype=cache_dtype)
    body.write_kv(key, value, actual[0], actual[1], slots)
    ref.write_kv(key, value, expected[0], expected[1], slots)
    assert torch.equal(actual, expected)
    body.write_kv(key[:0], value[:0], actual[0], actual[1], slots[:0])
    assert torch.equal(actual, expected)


def test_write_kv_rounds_to_int8(body: cpu.Body) -> None:
    """Halves go to the even neighbour; nothing, and what is too small to divide by, become 0; NaN and infinity NaN."""
    rows = torch.zeros(7, 1, 8)
    rows[0, 0] = torch.tensor([127.0, 0.5, 1.5, -0.5, -1.5, 2.5, -126.4, -127.0])
    rows[1, 0, 3] = -1e-3
    rows[3, 0, 1] = 1e-42
    rows[4, 0, 7], rows[5, 0, 0], rows[6, 0, 2] = float("inf"), float("nan"), float("-inf")
    for write_kv in (body.write_kv, ref.write_kv):
        key_cache, value_cache = torch.zeros(2, 1, 1, 8, 12, dtype=torch.int8)
        write_kv(rows, -rows, key_cache, value_cache, torch.arange(7))
        values, scales = scaled_parts(key_cache)
        assert values[0, 0, 0].tolist() == [127, 0, 2, 0, -2, 2, -126, -127]
        assert values[0, 0, 1].tolist() == [0, 0, 0, -127, 0, 0, 0, 0]
        assert not values[0, 0, 2:].any()
        torch.testing.assert_close(
            scales[0, 0, :7], torch.tensor([1.0, 1e-3 / 127, 0, 0, *[float("nan")] * 3]), equal_nan=True
        )
        assert torch.equal(scaled_parts(value_cache)[0], -values)


def test_write_kv_takes_keys_of_another_layout(body: cpu.Body, dtype: torch.dtype) -> None:
    key, value = torch.randn(2, 6, 64, 2).to(dtype).transpose(2, 3)
    actual, expected = torch.zeros(2, 2, 2, 8, 64, dtype=dtype), torch.zeros(2, 2, 2, 8, 64, dtype=dtype)
    slots = torch.tensor([0, 15, -1, 7, 8, 3])
    body.write_kv(key, value, actual[0], actual[1], slots)
    ref.write_kv(key, value, expected[0], expected[1], slots)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("pairs", [[(0, 3)], [(0, 5), (0, 4), (1, 7)], [(i, 99 - i) for i in range(40)], []])
def test_copy_blocks(body: cpu.Body, dtype: torch.dtype, pairs: list[tuple[int, int]]) -> None:
    caches = torch.randn(2, 100, 3, 16, 64).to(dtype)
    expected = caches.clone()
    moves = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    body.copy_blocks(caches[0], caches[1], moves)
    ref.copy_blocks(expected[0], expected[1], moves)
    assert torch.equal(caches, expected)


@pytest.mark.parametrize("shape", [(1, 576), (3, 64), (5, 100), (0, 576), (251, 576), (2, 3, 128)], ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=["float32 weight", "bfloat16 weight"])
def test_rms_norm(body: cpu.Body, dtype: torch.dtype, weight_dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(weight_dtype)
    close(body.rms_norm(x, weight, 1e-6), ref.rms_norm(x, weight, 1e-6))
    residual = torch.randn(shape).to(dtype)
    expected, total = ref.add_rms_norm(x, residual, weight, 1e-6)
    actual, actual_total = body.add_rms_norm(x.clone(), residual.clone(), weight, 1e-6)
    close(actual, expected)
    assert torch.equal(actual_total, total)


def test_rms_norm_of_strided_rows(body: cpu.Body, dtype: torch.dtype) -> None:
    fused = torch.randn(7, 960).to(dtype)
    weight = torch.randn(64).to(dtype)
    heads = fused[:, :576].view(7, 9, 64)
    close(body.rms_norm(heads, weight, 1e-5), ref.rms_norm(heads, weight, 1e-5))
    rows = fused[:, 64:128]
    close(body.rms_norm(rows, weight, 1e-5), ref.rms_norm(rows, weight, 1e-5))
    columns = torch.randn(64, 7).to(dtype).t()
    close(body.rms_norm(columns, weight, 1e-5), ref.rms_norm(columns, weight, 1e-5))
    expected = ref.add_rms_norm(rows, rows * 2, weight, 1e-5)
    for actual, wanted in zip(body.add_rms_norm(rows, rows * 2, weight, 1e-5), expected, strict=True):
        close(actual, wanted)


@pytest.mark.parametrize(("head_size", "rotated"), [(64, 64), (128, 128), (80, 80), (64, 16), (96, 24), (256, 64)])
@pytest.mark.parametrize("num_tokens", [0, 1, 450])
def test_rotary(body: cpu.Body, dtype: torch.dtype, num_tokens: int, head_size: int, rotated: int) -> None:
    fused = torch.randn(num_tokens, 6, head_size).to(dtype)
    positions = torch.randint(0, 100, (num_tokens,))
    cos_sin = torch.randn(100, rotated)
    expected = ref.rotary(fused[:, :4].clone(), fused[:, 4:5].clone(), positions, cos_sin)
    value = fused[:, 5].clone()
    for actual, wanted in zip(body.rotary(fused[:, :4], fused[:, 4:5], positions, cos_sin), expected, strict=True):
        close(actual, wanted)
    assert torch.equal(fused[:, 5], value)


@pytest.mark.parametrize("name", ["silu_and_mul", "gelu_tanh_and_mul"])
@pytest.mark.parametrize("shape", [(1, 3072), (3, 200), (0, 64), (45, 3072)], ids=str)
def test_gated_activations(body: cpu.Body, dtype: torch.dtype, name: str, shape: tuple[int, int]) -> None:
    x = (torch.randn(shape) * 4).to(dtype)
    close(getattr(body, name)(x), getattr(ref, name)(x))
    wide = (torch.randn(shape[0], shape[1] + 8) * 4).to(dtype)[:, :-8]
    close(getattr(body, name)(wide), getattr(ref, name)(wide))


@pytest.mark.parametrize("shape", [(1, 3072), (3, 100), (0, 64), (45, 3072)], ids=str)
def test_gelu_tanh(body: cpu.Body, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = (torch.randn(shape[0], shape[1] + 8) * 4).to(dtype)[:, :-8]
    actual = body.gelu_tanh(x)
    close(actual, ref.gelu_tanh(x))
    assert all(torch.equal(actual[i : i + 1], body.gelu_tanh(x[i : i + 1])) for i in range(shape[0]))


@pytest.mark.parametrize("name", ["silu_and_mul", "gelu_tanh_and_mul"])
def test_gated_activations_keep_their_limits(body: cpu.Body, name: str) -> None:
    gate = torch.tensor([-1e4, -90.0, -88.0, 0.0, 88.0, 90.0, 1e4, float("nan"), -1e-6, 1e-6])
    x = torch.cat((gate, torch.ones(10))).unsqueeze(0)
    torch.testing.assert_close(getattr(body, name)(x), getattr(ref, name)(x), rtol=1e-5, atol=1e-9, equal_nan=True)


def test_select_takes_the_native_body_where_it_can_run() -> None:
    chosen = ops.select(torch.device("cpu"), torch.float32)
    assert {body for _, body in chosen.bodies} == {"cpu"}
    assert {body for _, body in ops.select(torch.device("cpu"), torch.float64).bodies} == {"ref"}
    assert not cpu.Body.available(torch.device("cpu"), torch.float16)
    assert not cpu.Body.available(torch.device("cuda"), torch.float32)


def test_load_refuses_what_cannot_run() -> None:
    with pytest.raises(ValueError, match="Unknown CPU instruction set 'avx1024'"):
        cpu.load("avx1024")
    for isa in set(ISAS) - set(runnable()):
        with pytest.raises(ValueError, match="cannot run here"):
            cpu.load(isa)


def test_without_libraries_nothing_is_available(tmp_path) -> None:
    assert runnable(tmp_path) == {}
    assert cpu_flags(tmp_path / "missing") == frozenset()

"""Sampling, every body: against naive row-by-row definitions, as a distribution, and alone against in a batch.

Native bodies also against `ref`: largest logits, ranks and the most likely tokens exactly; log probabilities to 2e-5;
the token of a draw is the same except where the uniform lies next to an edge, which exp() rounds differently (EPS).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.engine.runner.philox import uniforms
from octavo.kernels import cpu, ref
from octavo.kernels.cpu.library import runnable
from octavo.kernels.sampling import BLOCK, Draws, Masks

EPS = 2e-6  # of probability: float32 weights, summed
BODIES = ["ref", *runnable()]
ROW_KINDS = {
    "spread": [1.0, 2.0, 3.0, 2.5],
    "one": [-torch.inf, -torch.inf, 5.0, -torch.inf],
    "none": [-torch.inf] * 4,
    "ties": [2.0, 3.0, 3.0, 3.0],
    "zeros": [-1.0, -0.0, 0.0, -0.0],
    "nan": [1.0, torch.nan, 5.0, 0.0],
    "minus nan": [1.0, -torch.nan, 5.0, 0.0],
    "infinite": [1.0, torch.inf, 5.0, torch.inf],
    "huge": [3e38, -3e38, 1e38, 0.0],
    "tiny": [1e-44, 0.0, 2e-44, -1e-44],
}


def load(name: str) -> Any:
    return ref if name == "ref" else cpu.load(name)


@pytest.fixture(params=BODIES)
def body(request: pytest.FixtureRequest) -> Any:
    return load(request.param)


@pytest.fixture(params=list(runnable()) or ["ref"])
def native(request: pytest.FixtureRequest) -> Any:
    return load(request.param)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Two threads, whatever the environment says, so that sharing work is tested too."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def draw_with(body: Any, logits: torch.Tensor, asked: Draws) -> torch.Tensor:
    return body.draw(logits, body.find_peaks(logits), asked)


def kept_tokens(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray | None:
    """[V] bool by the words of the definition, in float64; None where a filter's edge is too close to call."""
    with np.errstate(over="ignore"):
        gaps = (logits.max() - logits).astype(np.float64)  # ties as float32 sees them
    probs = np.exp(-gaps / temperature)
    kept = np.ones(len(logits), bool)
    if min_p > 0:
        if np.any(np.abs(probs - min_p) < 1e-5 * min_p):
            return None
        kept &= probs >= min_p
    if top_k < kept.sum():
        kept &= gaps <= np.sort(gaps)[top_k - 1]
    if top_p < 1:
        masses = {gap: probs[kept & (gaps == gap)].sum() for gap in np.unique(gaps[kept])}
        total, before = sum(masses.values()), 0.0
        for gap, mass in masses.items():
            # Inside a group of ties any cut keeps the whole group, so only the edges between groups are delicate.
            if abs(before - top_p * total) < EPS * total:
                return None
            if before >= top_p * total:
                kept &= gaps < gap
                break
            before += mass
    return kept


def check_token(token: int, logits: np.ndarray, u: float, kept: np.ndarray, temperature: float) -> None:
    probs = np.where(kept, np.exp(-(logits.max() - logits).astype(np.float64) / temperature), 0.0)
    cdf = np.cumsum(probs / probs.sum())
    assert kept[token]
    assert cdf[token] >= u - EPS
    assert token == 0 or cdf[token - 1] <= u + EPS


def draws(rows: np.ndarray, seed: int = 0, **numbers: object) -> Draws:
    n = len(rows)
    defaults = {"temperature": 1.0, "top_k": 10**9, "top_p": 1.0, "min_p": 0.0}
    dtypes = {"top_k": np.int64}
    columns = {
        name: np.broadcast_to(np.asarray(numbers.get(name, default), dtypes.get(name, np.float64)), (n,)).copy()
        for name, default in defaults.items()
    }
    u = np.asarray(numbers.get("uniforms", uniforms(np.full(n, seed, np.uint64), np.arange(n))), np.float64)
    return Draws(rows=np.asarray(rows, np.int64), uniforms=u, **columns)


def logits_like(rng: np.random.Generator, rows: int, vocab: int, spread: float, coarse: bool) -> torch.Tensor:
    """Random logits; coarse ones are bfloat16 values, so that many tie."""
    logits = torch.from_numpy(rng.normal(0, spread, (rows, vocab)).astype(np.float32))
    return logits.bfloat16().float() if coarse else logits


def row_of(kind: list[float], vocab: int) -> torch.Tensor:
    """[V]: the kind's numbers spread over a row of -5, which a vocabulary of another size spreads elsewhere."""
    row = torch.full((vocab,), -5.0 if max(kind) > -torch.inf else -torch.inf)
    row[torch.linspace(0, vocab - 1, min(len(kind), vocab)).long()] = torch.tensor(kind[:vocab])
    if sum(math.isinf(x) for x in kind) == len(kind) - 1:  # all but one are masked
        row[row == -5.0] = -torch.inf
    return row


@pytest.mark.parametrize("vocab", [1, 3, 63, 64, 65, 1000, 1024, 1100, 5001])
def test_peaks(body: Any, vocab: int) -> None:
    random = torch.randn(1, vocab, generator=torch.Generator().manual_seed(vocab))
    logits = torch.cat((random, *(row_of(kind, vocab)[None] for kind in ROW_KINDS.values()), random * 1e-3 - 9))
    peaks = body.find_peaks(logits)
    assert peaks.maxima.shape == (len(logits), -(-vocab // BLOCK))
    for row, maxima, top, token in zip(logits, peaks.maxima, peaks.top, peaks.token_ids, strict=True):
        expected = torch.stack([part.amax() for part in row.split(BLOCK)])
        torch.testing.assert_close(maxima, expected, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(top, row.amax(), rtol=0, atol=0, equal_nan=True)
        assert token == (row.argmax() if row.amax().isfinite() else 0)


@pytest.mark.parametrize("vocab", [3, 64, 1100])
@pytest.mark.parametrize("numbers", [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}, {"top_k": 900, "top_p": 0.9}])
def test_draws_of_edge_rows(body: Any, vocab: int, numbers: dict) -> None:
    """In a batch with sound rows, which do not notice."""
    sound = torch.randn(2, vocab, generator=torch.Generator().manual_seed(vocab))
    for kind in ROW_KINDS.values():
        odd = row_of(kind, vocab)
        asked = draws(np.arange(4), uniforms=[0.3, 2.0**-54, 0.8, 1 - 2.0**-53], **numbers)
        first, low, last, high = draw_with(body, torch.stack((sound[0], odd, sound[1], odd)), asked).tolist()
        assert first == draw_with(body, sound[:1], rows_alone(asked, 0))
        assert last == draw_with(body, sound[1:], rows_alone(asked, 2))
        if not odd.amax().isfinite():
            assert (low, high) == (0, 0)
            continue
        limits = (numbers.get(name, default) for name, default in (("top_k", vocab), ("top_p", 1.0), ("min_p", 0.0)))
        kept = kept_tokens(odd.numpy(), 1.0, *limits)
        for token in (low, high):
            assert odd[token] > -torch.inf
            assert kept is None or kept[token]


def test_no_rows(body: Any) -> None:
    logits = torch.zeros(0, 100)
    peaks = body.find_peaks(logits)
    assert (peaks.maxima.shape, peaks.top.shape, peaks.token_ids.shape) == ((0, 2), (0,), (0,))
    assert body.draw(logits, peaks, draws(np.arange(0))).shape == (0,)
    assert body.draw(torch.zeros(3, 100), body.find_peaks(torch.zeros(3, 100)), draws(np.arange(0))).shape == (0,)
    assert body.take_logprobs(logits, torch.zeros(0, dtype=torch.int64), 4).ids.shape == (0, 4)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(BODIES),
    seed=st.integers(0, 2**32),
    vocab=st.sampled_from([1, 2, 7, 63, 64, 65, 128, 500, 1024, 3000, 8300]),
    spread=st.sampled_from([0.0, 0.1, 1.0, 4.0, 30.0]),
    coarse=st.booleans(),
    temperature=st.sampled_from([0.01, 0.3, 0.7, 1.0, 1.7, 50.0]),
    top_k=st.sampled_from([1, 2, 5, 40, 130, 10**9]),
    top_p=st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 0.9999999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.2, 1.0]),
)
def test_draw_is_the_definition(name, seed, vocab, spread, coarse, temperature, top_k, top_p, min_p):
    logits = logits_like(np.random.default_rng(seed), 6, vocab, spread, coarse)
    asked = draws(np.arange(6), seed, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    tokens = draw_with(load(name), logits, asked).tolist()
    for row, token in enumerate(tokens):
        kept = kept_tokens(logits[row].numpy(), temperature, top_k, top_p, min_p)
        if kept is not None:
            check_token(token, logits[row].numpy(), asked.uniforms[row], kept, temperature)


def of_all_kinds(rng: np.random.Generator, n: int, vocab: int, seed: int) -> Draws:
    return draws(
        np.arange(n),
        seed,
        temperature=rng.choice([0.2, 0.8, 1.0, 1.6], n),
        top_k=rng.choice([1, 4, 30, 200, vocab], n),
        top_p=rng.choice([0.3, 0.9, 0.99, 1.0], n),
        min_p=rng.choice([0.0, 0.0, 0.05], n),
    )


@pytest.mark.parametrize("vocab", [640, 5001, 49152])
@pytest.mark.parametrize("spread", [0.0, 0.5, 2.0, 6.0])
@pytest.mark.parametrize("coarse", [False, True])
def test_native_draws_are_those_of_the_definition(native: Any, vocab: int, spread: float, coarse: bool) -> None:
    rng = np.random.default_rng(vocab)
    n = 24
    logits = logits_like(rng, n, vocab, spread, coarse)
    asked = of_all_kinds(rng, n, vocab, vocab)
    assert torch.equal(draw_with(native, logits, asked), draw_with(ref, logits, asked))


def rows_alone(asked: Draws, row: int) -> Draws:
    """That one row of `asked`, as the only one of its batch."""
    one = asked.pick(np.array([row]))
    return Draws(np.array([0]), *(getattr(one, name) for name in Draws.__slots__[1:]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(BODIES),
    seed=st.integers(0, 2**32),
    vocab=st.sampled_from([640, 2560, 5001]),
    spread=st.sampled_from([0.5, 2.0, 6.0]),
    coarse=st.booleans(),
)
def test_the_batch_does_not_change_a_row(name, seed, vocab, spread, coarse):
    """Rows of all kinds: together, alone, in another order: the same tokens."""
    body = load(name)
    rng = np.random.default_rng(seed)
    n = 12
    logits = logits_like(rng, n, vocab, spread, coarse)
    asked = of_all_kinds(rng, n, vocab, seed)
    together = draw_with(body, logits, asked).tolist()
    order = rng.permutation(n)
    assert draw_with(body, logits, asked.pick(order)).tolist() == [together[row] for row in order]
    for row in range(n):
        assert draw_with(body, logits[row : row + 1].clone(), rows_alone(asked, row)).tolist() == [together[row]]


@pytest.mark.parametrize("vocab", [49152, 151936 + 7])
def test_threads_and_the_batch_do_not_change_a_bit(body: Any, vocab: int) -> None:
    """Log probabilities show every bit of a row's sum. A row alone of the larger vocabulary is split."""
    rng = np.random.default_rng(3)
    logits = logits_like(rng, 5, vocab, 4.0, False)
    tokens, asked = torch.arange(5) * 1000, of_all_kinds(rng, 5, vocab, 1)
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        taken = body.take_logprobs(logits, tokens, 7)
        drawn = draw_with(body, logits, asked)
        for row in range(5):
            alone = body.take_logprobs(logits[row : row + 1].clone(), tokens[row : row + 1], 7)
            assert all(torch.equal(x[0], y[row]) for x, y in zip(alone.parts(), taken.parts(), strict=True))
            assert draw_with(body, logits[row : row + 1].clone(), rows_alone(asked, row))[0] == drawn[row]
        found.append((*taken.parts(), drawn))
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))


@pytest.mark.parametrize("vocab", [1, 5, 64, 200, 3000, 9000])
@pytest.mark.parametrize("coarse", [False, True])
def test_native_logprobs_are_those_of_the_definition(native: Any, vocab: int, coarse: bool) -> None:
    rng = np.random.default_rng(vocab)
    logits = logits_like(rng, 6, vocab, 4.0, coarse)
    logits[5, 1::2] = -torch.inf
    tokens = torch.from_numpy(rng.integers(0, vocab, 6))
    for k in sorted({0, 1, min(5, vocab), min(700, vocab), vocab}):
        expected, actual = ref.take_logprobs(logits, tokens, k), native.take_logprobs(logits, tokens, k)
        assert torch.equal(actual.ranks, expected.ranks)
        assert torch.equal(logits.gather(1, actual.ids), logits.topk(k).values)
        assert all(len(set(ids)) == k for ids in actual.ids.tolist())
        torch.testing.assert_close(actual.own, expected.own, rtol=1e-6, atol=2e-5)
        torch.testing.assert_close(actual.values, expected.values, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("kind", ["nan", "infinite", "none"])
def test_logprobs_of_broken_rows(body: Any, kind: str) -> None:
    logits = torch.stack((row_of(ROW_KINDS[kind], 300), torch.arange(300.0)))
    taken = body.take_logprobs(logits, torch.tensor([0, 299]), 4)
    assert taken.own[0] == -torch.inf
    assert taken.values[0].tolist() == [-torch.inf] * 4
    assert len(set(taken.ids[0].tolist())) == 4
    assert taken.ids[1].tolist() == [299, 298, 297, 296]
    assert taken.ranks[1] == 1


def test_native_ops_refuse_other_logits(native: Any) -> None:
    if native is ref:
        pytest.skip("no CPU library was built")
    for logits in (torch.zeros(2, 8, dtype=torch.float64), torch.zeros(8, 2).t()):
        with pytest.raises(ValueError, match="contiguous float32"):
            native.find_peaks(logits)


# chi-square quantiles at p = 0.001 by degrees of freedom
CHI_SQUARE = {2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32, 8: 26.12, 9: 27.88, 10: 29.59, 11: 31.26}


@pytest.mark.parametrize(
    "numbers",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 2.0},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.3, "top_k": 8, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=str,
)
@pytest.mark.parametrize("by", ["position", "seed"])
def test_distribution(body: Any, numbers: dict, by: str):
    """20000 draws of one row; fixed seeds, so this passes or fails, it never flakes."""
    n, vocab = 20000, 12
    row = np.random.default_rng(11).normal(0, 1.2, vocab).astype(np.float32)
    logits = torch.from_numpy(np.tile(row, (n, 1)))
    fixed, counting = np.full(n, 99), np.arange(n)
    seeds, positions = (fixed, counting) if by == "position" else (counting, fixed)
    asked = draws(np.arange(n), uniforms=uniforms(seeds.astype(np.uint64), positions), **numbers)
    counts = np.bincount(draw_with(body, logits, asked).numpy(), minlength=vocab)
    temperature = numbers.get("temperature", 1.0)
    kept = kept_tokens(
        row, temperature, numbers.get("top_k", vocab), numbers.get("top_p", 1.0), numbers.get("min_p", 0.0)
    )
    assert kept is not None
    assert counts[~kept].sum() == 0
    probs = np.where(kept, np.exp(row.astype(np.float64) / temperature), 0)
    expected = n * (probs / probs.sum())[kept]
    assert ((counts[kept] - expected) ** 2 / expected).sum() < CHI_SQUARE[int(kept.sum()) - 1]


def test_a_small_error_in_the_logits_rarely_changes_the_token(body: Any):
    """The CDF runs in token order: noise of 1e-5 moves edges by about as much, even where near-equal logits swap."""
    rng = np.random.default_rng(0)
    logits = logits_like(rng, 2000, 1000, 0.001, False)  # nearly uniform: any noise reorders everything
    noisy = logits + torch.from_numpy(rng.normal(0, 1e-5, logits.shape).astype(np.float32))
    asked = draws(np.arange(2000), 1)
    same = draw_with(body, logits, asked) == draw_with(body, noisy, asked)
    assert same.float().mean() > 0.99


def test_extreme_uniforms_and_lonely_tokens(body: Any):
    """u next to 0 and 1 finds the first and the last kept token, never one of no probability."""
    logits = torch.full((2, 300), -torch.inf)
    logits[:, [70, 71, 250]] = torch.tensor([1.0, 2.0, 1.5])
    asked = draws(np.arange(2), uniforms=[2.0**-54, 1 - 2.0**-53])
    assert draw_with(body, logits, asked).tolist() == [70, 250]
    asked = draws(np.arange(2), uniforms=[2.0**-54, 1 - 2.0**-53], top_k=2)
    assert draw_with(body, logits, asked).tolist() == [71, 250]


def test_ties_are_kept_together(body: Any):
    logits = torch.zeros(1000, 8)
    logits[:, 5:] = -1.0
    for numbers in ({"top_k": 1}, {"top_p": 0.05}):
        tokens = draw_with(body, logits, draws(np.arange(1000), **numbers))
        assert sorted(set(tokens.tolist())) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("temperature", [1e-2, 1e30])
def test_extreme_temperatures(body: Any, temperature: float):
    """Huge temperature: uniform over what is not masked; the floor: the best token."""
    logits = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)) * 5
    logits[:, ::2] = -torch.inf
    tokens = draw_with(body, logits, draws(np.arange(500), temperature=temperature))
    if temperature < 1:
        assert (tokens == logits.argmax(dim=-1)).float().mean() > 0.97
    else:
        assert set(tokens.tolist()) == set(range(1, 64, 2))
        assert math.isclose(tokens.float().mean().item(), 32, abs_tol=3)


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 64, 100, 1000, 49152])
def test_masks_leave_what_they_allow_and_nothing_else(body, vocab):
    rng = np.random.default_rng(vocab)
    logits = logits_like(rng, 5, vocab, 3.0, False)
    logits[1, 0] = torch.nan
    before = logits.clone()
    rows = np.array([4, 1, 2])
    words = -(-vocab // 32)
    bits = rng.integers(0, 1 << 32, (3, words), np.uint32) | rng.choice(np.uint32([0, 0xFFFFFFFF]), (3, words))
    body.mask_logits(logits, Masks(rows, torch.from_numpy(bits.view(np.int32))))
    allowed = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little")[:, :vocab].astype(bool)
    for row, keeps in zip(rows, torch.from_numpy(allowed), strict=True):
        before[row] = torch.where(keeps, before[row], -torch.inf)
    torch.testing.assert_close(logits, before, rtol=0, atol=0, equal_nan=True)

"""The draw: against a naive row-by-row definition, as a distribution, and alone against in a batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.engine.runner.philox import uniforms
from octavo.engine.runner.sampler_draw import Blocks, Draws, draw, greedy

EPS = 2e-6  # of probability: float32 weights, summed


def kept_tokens(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray | None:
    """[V] bool by the words of the definition, in float64; None where a filter's edge is too close to call."""
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


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    vocab=st.sampled_from([1, 2, 7, 63, 64, 65, 128, 500, 1024, 3000]),
    spread=st.sampled_from([0.0, 0.1, 1.0, 4.0, 30.0]),
    coarse=st.booleans(),
    temperature=st.sampled_from([0.01, 0.3, 0.7, 1.0, 1.7, 50.0]),
    top_k=st.sampled_from([1, 2, 5, 40, 10**9]),
    top_p=st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.2, 1.0]),
    narrow=st.sampled_from([1, 3, 8, 128]),
)
def test_draw_is_the_definition(seed, vocab, spread, coarse, temperature, top_k, top_p, min_p, narrow):
    logits = logits_like(np.random.default_rng(seed), 6, vocab, spread, coarse)
    asked = draws(np.arange(6), seed, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    tokens = draw(Blocks.of(logits), asked, vocab, narrow_blocks=narrow).tolist()
    for row, token in enumerate(tokens):
        kept = kept_tokens(logits[row].numpy(), temperature, top_k, top_p, min_p)
        if kept is not None:
            check_token(token, logits[row].numpy(), asked.uniforms[row], kept, temperature)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    vocab=st.sampled_from([640, 2560, 5001]),
    spread=st.sampled_from([0.5, 2.0, 6.0]),
    coarse=st.booleans(),
)
def test_neither_the_batch_nor_the_way_changes_a_row(seed, vocab, spread, coarse):
    """Rows of all kinds: together, alone, in another order, whole and narrow: the same tokens."""
    rng = np.random.default_rng(seed)
    n = 12
    logits = logits_like(rng, n, vocab, spread, coarse)
    asked = draws(
        np.arange(n),
        seed,
        temperature=rng.choice([0.2, 0.8, 1.0, 1.6], n),
        top_k=rng.choice([1, 4, 30, 200, vocab], n),
        top_p=rng.choice([0.3, 0.9, 0.99, 1.0], n),
        min_p=rng.choice([0.0, 0.0, 0.05], n),
    )
    together = draw(Blocks.of(logits), asked, vocab).tolist()
    for narrow in (1, 4, 1000):
        assert draw(Blocks.of(logits), asked, vocab, narrow_blocks=narrow).tolist() == together
    order = rng.permutation(n)
    shuffled = Draws(np.arange(n), *(getattr(asked.pick(order), name) for name in Draws.__slots__[1:]))
    moved = draw(Blocks.of(logits[torch.from_numpy(order)].contiguous()), shuffled, vocab).tolist()
    assert moved == [together[row] for row in order]
    for row in range(n):
        one = asked.pick(np.array([row]))
        one = Draws(np.array([0]), *(getattr(one, name) for name in Draws.__slots__[1:]))
        assert draw(Blocks.of(logits[row : row + 1].clone()), one, vocab).tolist() == [together[row]]


def test_block_sums_are_the_same_bits_alone_and_with_any_number_of_threads():
    from octavo.engine.runner.sampler_draw import row_sums

    logits = logits_like(np.random.default_rng(3), 9, 49152, 4.0, False)
    threads = torch.get_num_threads()
    try:
        sums = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            sums.append(row_sums(Blocks.of(logits)))
            for row in range(9):
                assert torch.equal(row_sums(Blocks.of(logits[row : row + 1].clone()))[0], sums[0][row])
        assert torch.equal(sums[0], sums[1])
        assert torch.equal(sums[0], sums[2])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("vocab", [16384, 20000])
@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(50, 1.0, 0.0), (10**9, 0.9, 0.0), (300, 0.8, 0.0), (0, 1, 0.1)])
def test_large_vocabulary_narrow_way(vocab, top_k, top_p, min_p):
    logits = logits_like(np.random.default_rng(0), 8, vocab, 4.0, False)
    asked = draws(np.arange(8), 5, temperature=0.8, top_k=top_k or vocab, top_p=top_p, min_p=min_p)
    tokens = draw(Blocks.of(logits), asked, vocab).tolist()
    assert tokens == draw(Blocks.of(logits), asked, vocab, narrow_blocks=vocab).tolist()
    for row, token in enumerate(tokens):
        kept = kept_tokens(logits[row].numpy(), 0.8, top_k or vocab, top_p, min_p)
        assert kept is not None
        check_token(token, logits[row].numpy(), asked.uniforms[row], kept, 0.8)


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
def test_distribution(numbers: dict, by: str):
    """20000 draws of one row; fixed seeds, so this passes or fails, it never flakes."""
    n, vocab = 20000, 12
    row = np.random.default_rng(11).normal(0, 1.2, vocab).astype(np.float32)
    logits = torch.from_numpy(np.tile(row, (n, 1)))
    fixed, counting = np.full(n, 99), np.arange(n)
    seeds, positions = (fixed, counting) if by == "position" else (counting, fixed)
    asked = draws(np.arange(n), uniforms=uniforms(seeds.astype(np.uint64), positions), **numbers)
    counts = np.bincount(draw(Blocks.of(logits), asked, vocab).numpy(), minlength=vocab)
    temperature = numbers.get("temperature", 1.0)
    kept = kept_tokens(
        row, temperature, numbers.get("top_k", vocab), numbers.get("top_p", 1.0), numbers.get("min_p", 0.0)
    )
    assert kept is not None
    assert counts[~kept].sum() == 0
    probs = np.where(kept, np.exp(row.astype(np.float64) / temperature), 0)
    expected = n * (probs / probs.sum())[kept]
    assert ((counts[kept] - expected) ** 2 / expected).sum() < CHI_SQUARE[int(kept.sum()) - 1]


def test_a_small_error_in_the_logits_rarely_changes_the_token():
    """The CDF runs in token order: noise of 1e-5 moves edges by about as much, even where near-equal logits swap."""
    rng = np.random.default_rng(0)
    logits = logits_like(rng, 2000, 1000, 0.001, False)  # nearly uniform: any noise reorders everything
    noisy = logits + torch.from_numpy(rng.normal(0, 1e-5, logits.shape).astype(np.float32))
    asked = draws(np.arange(2000), 1)
    same = draw(Blocks.of(logits), asked, 1000) == draw(Blocks.of(noisy), asked, 1000)
    assert same.float().mean() > 0.99


def test_extreme_uniforms_and_lonely_tokens():
    """u next to 0 and 1 finds the first and the last kept token, never one of no probability."""
    logits = torch.full((2, 300), -torch.inf)
    logits[:, [70, 71, 250]] = torch.tensor([1.0, 2.0, 1.5])
    asked = draws(np.arange(2), uniforms=[2.0**-54, 1 - 2.0**-53])
    assert draw(Blocks.of(logits), asked, 300).tolist() == [70, 250]
    asked = draws(np.arange(2), uniforms=[2.0**-54, 1 - 2.0**-53], top_k=2)
    assert draw(Blocks.of(logits), asked, 300).tolist() == [71, 250]


def test_ties_are_kept_together():
    logits = torch.zeros(1000, 8)
    logits[:, 5:] = -1.0
    for numbers in ({"top_k": 1}, {"top_p": 0.05}):
        tokens = draw(Blocks.of(logits), draws(np.arange(1000), **numbers), 8)
        assert sorted(set(tokens.tolist())) == [0, 1, 2, 3, 4]


def test_greedy_takes_the_first_of_equals():
    logits = torch.zeros(3, 200)
    logits[0, [150, 70]] = 3.0
    logits[1, 199] = 1.0
    assert greedy(Blocks.of(logits)).tolist() == [70, 199, 0]
    random = torch.randn(20, 5000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(greedy(Blocks.of(random)), random.argmax(dim=-1))


@pytest.mark.parametrize("temperature", [1e-2, 1e30])
def test_extreme_temperatures(temperature: float):
    """Huge temperature: uniform over what is not masked; the floor: the best token."""
    logits = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)) * 5
    logits[:, ::2] = -torch.inf
    tokens = draw(Blocks.of(logits), draws(np.arange(500), temperature=temperature), 64)
    if temperature < 1:
        assert (tokens == logits.argmax(dim=-1)).float().mean() > 0.97
    else:
        assert set(tokens.tolist()) == set(range(1, 64, 2))
        assert math.isclose(tokens.float().mean().item(), 32, abs_tol=3)

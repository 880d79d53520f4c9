"""Sampling in Triton against `ref`; without a GPU in Triton's interpreter.

Largest logits, ranks, the most likely tokens and draws exactly; log probabilities to 2e-5. A draw may differ from
`ref`'s where its uniform lies next to an edge of the CDF: `ref` rounds the sums of blocks to float32, these kernels do
not, and a GPU's exp() may differ in its last bit. None of the uniforms here lies so.
"""

import numpy as np
import pytest
import torch

from octavo.kernels import ref
from octavo.kernels.sampling import Draws, Masks
from octavo.kernels.triton.draw import draw, draw_rows
from octavo.kernels.triton.mask_logits import mask_logits
from octavo.kernels.triton.peaks import find_peaks
from octavo.kernels.triton.take_logprobs import take_logprobs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALL = 10**9
ODD = {
    "one": [-torch.inf, -torch.inf, 5.0, -torch.inf],
    "none": [-torch.inf] * 4,
    "ties": [2.0, 3.0, 3.0, 3.0],
    "zeros": [-1.0, -0.0, 0.0, -0.0],
    "nan": [1.0, torch.nan, 5.0, 0.0],
    "infinite": [1.0, torch.inf, 5.0, torch.inf],
    "huge": [3e38, -3e38, 1e38, 0.0],
    "tiny": [1e-44, 0.0, 2e-44, -1e-44],
}


def logits_of(rng: np.random.Generator, rows: int, vocab: int) -> torch.Tensor:
    """Rows flat and steep, every other with many ties."""
    spread = np.resize([0.5, 2.0, 6.0, 0.0], rows)[:, None]
    logits = torch.from_numpy((rng.normal(0, 1, (rows, vocab)) * spread).astype(np.float32))
    logits[::2] = logits[::2].bfloat16().float()
    return logits.to(DEVICE)


def odd_rows(vocab: int) -> torch.Tensor:
    rows = torch.full((len(ODD), vocab), -torch.inf)
    rows[:, torch.linspace(0, vocab - 1, 4).long()] = torch.tensor(list(ODD.values()))
    return rows.to(DEVICE)


def draws_of(
    rng: np.random.Generator, rows: int, temperature: object, top_k: object, top_p: object, min_p: object
) -> Draws:
    """Numbers taken in turn from what each filter lists; rows in another order than the batch's."""
    columns = [np.resize(np.asarray(numbers, np.float64), rows) for numbers in (temperature, top_p, min_p)]
    return Draws(
        rng.permutation(rows), columns[0], np.resize(np.asarray(top_k, np.int64), rows), *columns[1:], rng.random(rows)
    )


def check_draws(logits: torch.Tensor, draws: Draws) -> torch.Tensor:
    actual = draw(logits, find_peaks(logits), draws)
    assert torch.equal(actual, ref.draw(logits, ref.find_peaks(logits), draws))
    return actual


@pytest.mark.parametrize("vocab", [4, 65, 3001])
def test_peaks(vocab: int) -> None:
    logits = torch.cat((odd_rows(vocab), logits_of(np.random.default_rng(0), 3, vocab)))
    actual, expected = find_peaks(logits), ref.find_peaks(logits)
    torch.testing.assert_close(actual.maxima, expected.maxima, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(actual.top, expected.top, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(actual.token_ids, expected.token_ids)


@pytest.mark.parametrize("vocab", [1, 100, 2000])
def test_draws_are_those_of_the_definition(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    filters = ([0.2, 0.8, 1.0, 1.6], [30, ALL, 4, ALL, 200], [0.9, 1.0, 0.3, 0.99, 1.0, 0.9], [0, 0.05, 0])
    check_draws(logits_of(rng, 10, vocab), draws_of(rng, 10, *filters))


@pytest.mark.parametrize(
    "filters",
    [
        (1.0, ALL, 1.0, 0.0),
        ([0.01, 50, 1e30], ALL, 0.5, 0.0),
        (1.0, [1, 700], 1.0, 1e-3),
        (1.0, ALL, [1e-6, 0.9999999], [0, 1.0]),
    ],
    ids=["plain", "temperatures", "top_k", "top_p and min_p"],
)
def test_draws_with_extreme_numbers(filters: tuple) -> None:
    rng = np.random.default_rng(1)
    check_draws(logits_of(rng, 4, 777), draws_of(rng, 4, *filters))


def test_draws_of_odd_rows() -> None:
    """Each beside sound rows, which do not notice: alone they draw the same."""
    rng, vocab = np.random.default_rng(2), 130
    logits = torch.cat((odd_rows(vocab), logits_of(rng, 2, vocab)))
    draws = draws_of(rng, len(logits), 1.0, [2, ALL], 0.9, [0.01, 0.0, 0.0])
    together = check_draws(logits, draws)
    for at in np.flatnonzero(draws.rows >= len(ODD)):
        row, one = int(draws.rows[at]), draws.pick(np.array([at]))
        alone = Draws(np.array([0]), *(getattr(one, name) for name in Draws.__slots__[1:]))
        sound = logits[row : row + 1].clone()
        assert draw(sound, find_peaks(sound), alone) == together[at]


def test_a_uniform_next_to_0_or_1_finds_a_token_that_is_kept() -> None:
    logits = torch.full((2, 300), -torch.inf, device=DEVICE)
    logits[:, [70, 71, 250]] = torch.tensor([1.0, 2.0, 1.5], device=DEVICE)
    uniforms, ones = np.array([2.0**-54, 1 - 2.0**-53]), np.ones(2)
    for top_k, expected in ((ALL, [70, 250]), (2, [71, 250])):
        draws = Draws(np.arange(2), ones, np.full(2, top_k), ones, ones * 0, uniforms)
        assert draw(logits, find_peaks(logits), draws).tolist() == expected


def test_what_a_graph_reads_anew() -> None:
    """The numbers' memory stays, what it holds changes; filters that no row asks for change nothing."""
    rng = np.random.default_rng(3)
    logits = logits_of(rng, 3, 200)
    peaks, numbers = find_peaks(logits), torch.empty(6, 3, dtype=torch.float64, device=DEVICE)
    for top_k in ([5, ALL], ALL):
        draws = draws_of(rng, 3, 1.0, top_k, 1.0, 0.0)
        numbers.copy_(torch.from_numpy(draws.numbers()))
        assert torch.equal(draw_rows(logits, peaks, numbers, filtered=True), ref.draw(logits, peaks, draws))


def test_no_rows() -> None:
    logits, none = torch.zeros(0, 100, device=DEVICE), np.zeros(0)
    peaks = find_peaks(logits)
    assert (peaks.maxima.shape, peaks.top.shape, peaks.token_ids.shape) == ((0, 2), (0,), (0,))
    assert draw(logits, peaks, Draws(none.astype(int), none, none.astype(int), none, none, none)).shape == (0,)
    ids = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert take_logprobs(logits, ids, 4).ids.shape == (0, 4)


@pytest.mark.parametrize(("vocab", "ks"), [(5, (0, 1, 5)), (3000, (0, 5, 300))])
def test_logprobs_are_those_of_the_definition(vocab: int, ks: tuple[int, ...]) -> None:
    rng = np.random.default_rng(vocab)
    logits = logits_of(rng, 4, vocab)
    logits[3, 1::2] = -torch.inf
    tokens = torch.from_numpy(rng.integers(0, vocab, 4)).to(DEVICE)
    for k in ks:
        expected, actual = ref.take_logprobs(logits, tokens, k), take_logprobs(logits, tokens, k)
        assert torch.equal(actual.ranks, expected.ranks)
        assert torch.equal(logits.gather(1, actual.ids), logits.topk(k).values)
        assert all(len(set(ids)) == k for ids in actual.ids.tolist())
        torch.testing.assert_close(actual.own, expected.own, rtol=1e-6, atol=2e-5)
        torch.testing.assert_close(actual.values, expected.values, rtol=1e-6, atol=2e-5)


def test_logprobs_of_broken_rows() -> None:
    broken = odd_rows(300)[[list(ODD).index(kind) for kind in ("none", "nan", "infinite")]]
    logits = torch.cat((broken, torch.arange(300.0, device=DEVICE)[None]))
    taken = take_logprobs(logits, torch.tensor([0, 0, 0, 299], device=DEVICE), 4)
    assert (taken.own[:3] == -torch.inf).all()
    assert (taken.values[:3] == -torch.inf).all()
    assert taken.ids[3].tolist() == [299, 298, 297, 296]
    assert taken.ranks[3] == 1


@pytest.mark.parametrize("vocab", [1, 33, 64, 5000])
def test_masks_leave_what_they_allow_and_nothing_else(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    logits = logits_of(rng, 5, vocab)
    logits[1, 0] = torch.nan
    expected, words = logits.clone(), -(-vocab // 32)
    bits = rng.integers(0, 1 << 32, (3, words), np.uint32) | rng.choice(np.uint32([0, 0xFFFFFFFF]), (3, words))
    masks = Masks(np.array([4, 1, 2]), torch.from_numpy(bits.view(np.int32)).to(DEVICE))
    mask_logits(logits, masks)
    ref.mask_logits(expected, masks)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0, equal_nan=True)


def test_other_logits_are_refused() -> None:
    for logits in (torch.zeros(2, 8, dtype=torch.float64), torch.zeros(8, 2).t()):
        with pytest.raises(ValueError, match="contiguous float32"):
            find_peaks(logits.to(DEVICE))

"""Penalties in Triton against `ref`, to the bit; without a GPU in Triton's interpreter."""

from dataclasses import fields

import numpy as np
import pytest
import torch

from octavo.kernels import ref
from octavo.kernels.sampling import Penalised, Tallies
from octavo.kernels.triton.penalties import apply_penalties, count_rows, count_tokens, penalise_rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB = 1000


def tallies_of(rng: np.random.Generator, lengths: list[int]) -> Tallies:
    """Lists of so many tokens, some of them put out; any token ids past their ends."""
    places, width = len(lengths), max(lengths) + 1
    counts, known = np.zeros((places, VOCAB), np.int32), np.zeros((places, VOCAB), np.bool_)
    seen = rng.integers(0, VOCAB, (places, width))
    for place, length in enumerate(lengths):
        listed = rng.permutation(VOCAB)[:length]
        seen[place, :length], known[place, listed] = listed, True
        counts[place, listed] = rng.integers(0, 4, length)
        if length:
            seen[place, length:] = listed[0]  # named once more, and must not suffer once more
    parts = (counts, known, seen, np.array(lengths, np.int64))
    return Tallies(*(torch.from_numpy(part).to(DEVICE) for part in parts))


def penalised_of(rng: np.random.Generator, rows: list[int], places: list[int], longest: int) -> Penalised:
    factors = (rng.uniform(*span, len(rows)).astype(np.float32) for span in ((0.5, 2), (-2, 2), (-2, 2)))
    return Penalised(np.array(rows), np.array(places), *factors, longest)


def copied(tallies: Tallies) -> Tallies:
    return Tallies(*(getattr(tallies, field.name).clone() for field in fields(Tallies)))


def logits_of(rows: int) -> torch.Tensor:
    logits = torch.randn(rows, VOCAB, device=DEVICE) * 4
    logits[0, :9] = torch.tensor([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 3e38, -3e38])
    return logits


def test_penalties_are_those_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    lengths = [VOCAB, 0, 1, 300, 256]
    tallies, logits = tallies_of(rng, lengths), logits_of(6)
    penalised = penalised_of(rng, [0, 4, 2, 5, 1], [0, 1, 4, 3, 2], max(lengths))
    expected = logits.clone()
    ref.apply_penalties(expected, tallies, penalised)
    assert (expected[[1, 5]] != logits[[1, 5]]).sum() > 200
    apply_penalties(logits, tallies, penalised)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0, equal_nan=True)


def test_what_was_drawn_is_counted() -> None:
    """Tokens that are known and tokens that are not, at the end of a full list and of an empty one."""
    rng = np.random.default_rng(1)
    tallies = tallies_of(rng, [VOCAB, 0, 5, 300])
    expected, drawn = copied(tallies), torch.from_numpy(rng.integers(0, VOCAB, 5)).to(DEVICE)
    drawn[1] = tallies.seen[2, 3]
    for places, rows in (([0, 1, 2], [4, 0, 1]), ([3, 1, 2], [0, 1, 2]), ([], [])):
        arguments = np.array(places, np.int64), np.array(rows, np.int64), drawn
        ref.count_tokens(expected, *arguments)
        count_tokens(tallies, *arguments)
        for name in ("counts", "known", "num_seen"):
            assert torch.equal(getattr(tallies, name), getattr(expected, name)), name
        for place, length in enumerate(tallies.num_seen.tolist()):
            assert torch.equal(tallies.seen[place, :length], expected.seen[place, :length])


def test_what_a_graph_reads_anew() -> None:
    """Rows without penalties take part with the place -1; a bound larger than the lists changes nothing."""
    rng = np.random.default_rng(2)
    tallies = tallies_of(rng, [40, 300])
    numbers = torch.zeros(5, 3, dtype=torch.float64, device=DEVICE)
    for rows, places in (([0, 1, 2], [1, -1, 0]), ([0, 1, 2], [-1, 0, -1])):
        held = [i for i, place in enumerate(places) if place >= 0]
        all_rows = penalised_of(rng, rows, places, 300)
        parts = (getattr(all_rows, field.name)[held] for field in fields(Penalised)[:-1])
        penalised = Penalised(*parts, longest=300)
        logits, drawn = logits_of(3), torch.from_numpy(rng.integers(0, VOCAB, 3)).to(DEVICE)
        expected, counted = logits.clone(), copied(tallies)
        ref.apply_penalties(expected, tallies, penalised)
        ref.count_tokens(counted, penalised.places, penalised.rows, drawn)
        numbers.copy_(torch.from_numpy(all_rows.numbers()))
        penalise_rows(logits, tallies, numbers, longest=tallies.seen.shape[1])
        count_rows(tallies, numbers, drawn)
        torch.testing.assert_close(logits, expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(tallies.counts, counted.counts)
        assert torch.equal(tallies.num_seen, counted.num_seen)


def test_other_logits_are_refused() -> None:
    rng = np.random.default_rng(3)
    with pytest.raises(ValueError, match="contiguous float32"):
        apply_penalties(torch.zeros(2, VOCAB).half(), tallies_of(rng, [3]), penalised_of(rng, [0], [0], 3))

"""Philox against its published known answers, the uniforms made of it, and sequence seeds."""

from __future__ import annotations

import numpy as np
import pytest

from octavo.engine.core.seeds import sequence_seed
from octavo.engine.runner.philox import Ahead, philox4x32, uniforms

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, answer.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def philox_in_python(counter: list[int], key: list[int]) -> list[int]:
    """The paper's definition with plain integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def test_known_answers():
    counters, keys, answers = zip(*((words(c), words(k), words(a)) for c, k, a in KNOWN_ANSWERS), strict=True)
    got = philox4x32(
        tuple(np.array(column, np.uint64) for column in zip(*counters, strict=True)),
        tuple(np.array(column, np.uint64) for column in zip(*keys, strict=True)),
    )
    assert np.stack(got, axis=1).tolist() == [list(answer) for answer in answers]


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1, 0x123456789ABCDEF0])
@pytest.mark.parametrize("position", [0, 1, 131072, 2**32 + 5])
def test_uniform_is_the_words_in_its_place(seed: int, position: int):
    answer = philox_in_python([position & 0xFFFFFFFF, position >> 32, 0, 0], [seed & 0xFFFFFFFF, seed >> 32])
    expected = ((answer[1] << 32 | answer[0]) >> 11) * 2.0**-53
    assert uniforms(np.array([seed], np.uint64), np.array([position]))[0] == expected


def test_uniforms_do_not_depend_on_their_neighbours():
    seeds, positions = np.arange(100, dtype=np.uint64), np.arange(100) * 7
    together = uniforms(seeds, positions)
    alone = [uniforms(seeds[i : i + 1], positions[i : i + 1])[0] for i in range(100)]
    assert together.tolist() == alone
    assert len(set(alone)) == 100
    assert uniforms(seeds[:0], positions[:0]).shape == (0,)


def test_uniforms_stay_inside_the_open_interval(monkeypatch: pytest.MonkeyPatch):
    for word, expected in ((0, 2.0**-54), (0xFFFFFFFF, 1 - 2.0**-53)):
        answer = (np.array([word], np.uint64),) * 4
        monkeypatch.setattr("octavo.engine.runner.philox.philox4x32", lambda *_, answer=answer: answer)
        assert uniforms(np.array([1], np.uint64), np.array([1]))[0] == expected
        assert 0 < expected < 1


def test_uniforms_are_even():
    values = uniforms(np.full(20000, 42, np.uint64), np.arange(20000))
    counts = np.histogram(values, bins=20, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # chi-square, 19 degrees of freedom, p = 0.001
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 0.03


def test_sequence_seeds():
    assert sequence_seed(7, 0) == 7
    assert sequence_seed(-1, 0) == 2**64 - 1
    seeds = {sequence_seed(request, index) for request in range(-50, 50) for index in range(20)}
    assert len(seeds) == 2000
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert sequence_seed(7, 3) == sequence_seed(7 + 2**64, 3)
    with pytest.raises(ValueError, match="at least 0"):
        sequence_seed(7, -1)


def test_numbers_made_ahead_are_the_same_numbers():
    """Slots that come and go, skip positions, go back (a resumed sequence) and change their seed."""
    rng = np.random.default_rng(0)
    ahead, seeds, positions = Ahead(6), rng.integers(0, 2**63, 6).astype(np.uint64), rng.integers(0, 50, 6)
    for _ in range(300):
        slots = rng.permutation(6)[: rng.integers(0, 7)]
        expected = uniforms(seeds[slots], positions[slots])
        assert np.array_equal(ahead.take(slots, seeds[slots], positions[slots]), expected)
        positions[slots] += 1
        if rng.random() < 0.1:
            slot = int(rng.integers(6))
            ahead.forget(slot)
            seeds[slot], positions[slot] = rng.integers(0, 2**63), rng.choice([0, positions[slot], 2**40])
        if rng.random() < 0.1:
            slot = int(rng.integers(6))
            positions[slot] = max(0, positions[slot] + rng.integers(-40, 40))

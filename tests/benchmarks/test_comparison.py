"""Speeds, ratios, goals and agreement, by hand."""

import pytest
from comparison import Goal, Measured, Work, agreement, common_lengths, ratios, speed, verdicts

WORK = Work(input_len=20, output_len=10)


def measured(seconds, first_token_s=(), token_ids=()):
    return Measured({}, "", 0.0, {2: list(seconds)}, {2: list(first_token_s)}, {2: [list(ids) for ids in token_ids]})


def test_speed_is_the_median_round():
    assert speed(measured([1.0, 4.0, 2.0]), 2, WORK) == 10.0
    assert speed(measured([]), 2, WORK) is None
    assert speed(measured([1.0]), 3, WORK) is None


def test_prefill_is_the_run_of_one_token_and_decode_the_rest():
    result = measured([3.0, 5.0, 4.0], [1.0, 2.0, 0.5])
    assert result.part_s(2, "decode") == [2.0, 3.0, 3.5]
    assert speed(result, 2, WORK, "prefill") == 2 * 20 / 1.0
    assert speed(result, 2, WORK, "decode") == 2 * 9 / 3.0
    assert speed(measured([3.0]), 2, WORK, "decode") is None


def test_ratios_are_those_of_each_round():
    ours, theirs = measured([1.0, 2.0, 4.0], [0.5, 1.0, 1.0]), measured([3.0, 2.0, 8.0], [1.0, 0.5, 5.0])
    assert ratios(ours, theirs, 2) == (3.0, 1.0, 2.0)
    assert ratios(ours, theirs, 2, "prefill") == (2.0, 0.5, 5.0)
    assert ratios(ours, theirs, 2, "decode") == (4.0, 1.5, 1.0)
    assert ratios(ours, measured([]), 2) == ()


def test_a_goal_is_judged_by_the_peer_that_comes_closest():
    results = {"mine": measured([1.0, 1.0, 2.0]), "slow": measured([9.0, 9.0, 9.0]), "fast": measured([3.0, 1.5, 3.0])}
    goals = [Goal("mine", ("slow", "fast", "absent"), 2, least) for least in (1.5, 1.6)]
    met, missed = verdicts(results, WORK, goals)
    assert (met.peer, met.ratio, met.ratios) == ("fast", 1.5, (3.0, 1.5, 1.5))
    assert (met.ours_tps, met.peer_tps) == (20.0, pytest.approx(20 / 3))
    assert (met.met, missed.met) == (True, False)


def test_a_goal_without_one_of_its_sides_is_not_judged():
    results = {"mine": measured([1.0]), "other": measured([1.0])}
    goals = [Goal("mine", ("absent",), 2, 1.0), Goal("absent", ("other",), 2, 1.0), Goal("mine", ("other",), 8, 1.0)]
    goals.append(Goal("mine", ("other",), 2, 1.0, "decode"))
    assert verdicts(results, WORK, goals) == []


def test_agreement():
    ours = [list(range(20)), list(range(20)), list(range(20))]
    theirs = [list(range(20)), [*range(16), 99, 17, 18, 19], [0, 99, *range(2, 20)]]
    assert common_lengths(ours, theirs) == [20, 16, 1]
    same, length = agreement(ours, theirs)
    assert same == pytest.approx(2 / 3)
    assert length == pytest.approx((20 + 16 + 1) / 3)
    assert agreement(ours, theirs, first=18)[0] == pytest.approx(1 / 3)
    assert agreement([[1, 2]], [[1, 2]]) == (1.0, 2.0)
    assert agreement([], []) == (0.0, 0.0)

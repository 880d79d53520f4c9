"""The waste benchmark on a workload whose waste is known by hand."""

import pytest
from kv_waste import GOAL, run, workload


def test_lengths_are_within_the_bounds():
    pairs = workload(500, 64, 1024, seed=1)
    totals = [prompt + output for prompt, output in pairs]
    assert min(totals) >= 64
    assert max(totals) <= 1024
    assert all(prompt >= 1 and output >= 1 for prompt, output in pairs)


def test_one_sequence_by_hand():
    # The prompt of 8 and two of the three generated tokens are computed (the last never is), in steps that end with
    # 8, 9 and 10 used slots in blocks of 8.
    result = run([(8, 3)], block_size=8, longest=16, num_blocks=4, max_num_seqs=1)
    assert result.sequences == 1
    unused, allocated = 0 + 7 + 6, 8 + 16 + 16
    assert result.mean == pytest.approx(unused / allocated)
    assert result.contiguous_mean == pytest.approx(1 - (8 + 9 + 10) / (3 * 16))


def test_the_goal_is_met_on_a_small_workload():
    result = run(workload(24, 64, 1024, seed=0), 16, 1024, num_blocks=1024, max_num_seqs=16)
    assert result.mean < GOAL
    assert result.mean < result.contiguous_mean / 5

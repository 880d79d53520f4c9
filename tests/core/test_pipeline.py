"""Scheduling for a pipeline: every stage has work, a row waits for its token, nobody is passed over."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from harness import Collector, engine, expected, request, run


def watched(core):
    """The plans that `core` launches, as they come."""
    plans, launch = [], core.process.launch
    core.process.launch = lambda plan: (plans.append(plan), launch(plan))
    return plans


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_as_many_steps_are_in_flight_as_there_are_stages(stages):
    core, got = engine(stages=stages, lag=stages - 1, max_num_batched_tokens=200), Collector()
    plans, collect = watched(core), core.process.collect
    depths = []
    core.process.collect = lambda: (depths.append(len(core.process._done)), collect())[1]
    made = [request(f"r{i}", [i + 1] * 5, max_tokens=24, ignore_eos=True) for i in range(7)]
    for item in made:
        core.add(item)
    run(core, got)
    busy = depths[stages : -stages * 2]
    assert sum(depth == stages for depth in busy) >= 0.9 * len(busy)
    widths = [len(plan.rows) for plan in plans[stages : -stages * 2]]
    assert max(widths) <= -(-7 // stages)
    assert all(got.tokens[r.request_id, 0] == expected(r) for r in made)


def test_rows_take_turns_whatever_is_in_flight():
    """Without overlap nothing is pending when a step is planned: by the policy's order the first half would win."""
    core = engine(stages=2, lag=0, max_num_batched_tokens=200)
    for i in range(6):
        core.add(request(f"r{i}", [i + 1] * 5, max_tokens=100, ignore_eos=True))
    got = Collector()
    for _ in range(21):
        got.take(core.step())
    assert {len(tokens) for tokens in got.tokens.values()} == {11}


def test_a_plan_brings_each_token_that_another_stage_drew_once():
    core, got = engine(stages=2, lag=1, num_blocks=16), Collector()
    plans = watched(core)
    made = [request(f"r{i}", [i + 1] * 20, max_tokens=60, ignore_eos=True, temperature=0) for i in range(5)]
    for item in made:
        core.add(item)
    run(core, got)
    assert core.stats().preemptions > 0
    for plan in plans:
        rows = {row.slot: row for row in plan.rows}
        assert all(position == rows[slot].start for slot, position, _ in plan.known)
    assert all(got.tokens[r.request_id, 0] == expected(r) for r in made)


def test_one_stage_brings_none():
    core, got = engine(), Collector()
    plans = watched(core)
    core.add(request("r", [1] * 20, max_tokens=20))
    run(core, got)
    assert all(plan.known == () for plan in plans)


def test_chunks_of_a_long_prompt_follow_one_another_without_a_gap():
    core = engine(stages=3, lag=2, max_num_batched_tokens=16)
    plans = watched(core)
    core.add(request("long", [3] * 100, max_tokens=2, ignore_eos=True))
    for _ in range(7):
        core.step()
    assert [plan.num_tokens for plan in plans[:7]] == [16] * 6 + [4]

"""What the offline benchmark makes of its steps, by hand; and one run of it with the fake engine."""

import math

import pytest
from drive import Bench, Run, Step
from metrics import Timing
from offline import result_of
from options import engine_options
from prompts import random_prompts

from octavo.engine.config import EngineConfig


def step(rows, tokens, wall_s, waited_s=0.0, computed_s=0.0, model_s=0.0):
    return Step(rows, tokens, tokens == rows, wall_s, waited_s, computed_s, model_s)


def test_result_by_hand():
    steps = (
        step(2, 20, wall_s=0.5, computed_s=0.4),
        step(2, 2, wall_s=0.10, waited_s=0.09, computed_s=0.098, model_s=0.093),
        step(2, 2, wall_s=0.10, waited_s=0.09, computed_s=0.098, model_s=0.093),
        step(1, 1, wall_s=9.0),  # not all rows: no decode step of n
    )
    timings = (Timing(0.0, 0.7, 10, 3, (0.5, 0.6, 0.7)), Timing(0.0, 0.7, 10, 3, (0.5, 0.6, 0.8)))
    result = result_of(2, 10, 3, [Run(0.75, steps, timings, ())])
    assert result.output_throughput_tps == pytest.approx(6 / 0.75)
    assert result.prefill_throughput_tps == pytest.approx(20 / 0.4)
    assert result.decode_step_s == pytest.approx(0.1)
    assert (result.host_s, result.host_part) == (pytest.approx(0.01), pytest.approx(0.1))
    assert (result.rank_bookkeeping_s, result.rank_bookkeeping_part) == (pytest.approx(0.005), pytest.approx(0.05))
    assert result.p50_ttft_s == pytest.approx(0.5)
    assert result.p50_tpot_s == pytest.approx(0.125)
    assert math.isnan(result_of(3, 10, 3, [Run(0.75, steps, timings, ())]).decode_step_s)


def test_the_fake_engine():
    bench = Bench(EngineConfig(model="fake", enable_prefix_caching=False, max_num_seqs=8))
    try:
        prompts = random_prompts(3, 20, bench.engine.info.vocab_size, "a test")
        run = bench.run(prompts, 5)
        again = bench.run(prompts, 5)
    finally:
        bench.close()
    assert [len(ids) for ids in run.token_ids] == [5, 5, 5]
    assert again.token_ids == run.token_ids
    assert [timing.num_output_tokens for timing in run.timings] == [5, 5, 5]
    assert sum(step.tokens for step in run.steps) >= 3 * (20 + 4)
    assert sum(step.decode and step.rows == 3 for step in run.steps) >= 4
    for taken in run.steps:
        assert 0 <= taken.waited_s <= taken.wall_s
        assert taken.model_s == taken.computed_s > 0
    assert sum(taken.wall_s for taken in run.steps) <= run.wall_s


def test_prompts_are_of_exact_length_and_new_for_each_key():
    first, second = (random_prompts(2, 7, 300, key) for key in ("a", "b"))
    assert [len(prompt) for prompt in first] == [7, 7]
    assert first != second
    assert first == random_prompts(2, 7, 300, "a")
    assert all(100 <= token < 300 for prompt in first for token in prompt)


def test_engine_options():
    found = engine_options(["block_size=32", "kernels=ref", "async_scheduling=false", "max_model_len=null"])
    assert found == {"block_size": 32, "kernels": "ref", "async_scheduling": False, "max_model_len": None}
    with pytest.raises(SystemExit, match="block_sise=32"):
        engine_options(["block_sise=32"])

"""Host time by hand, and with the fake engine."""

import pytest
from drive import Bench, Step
from host_time import growth, host_time_of, measure, parse, show_results

from octavo.engine.config import EngineConfig


def step(wall_s, waited_s, computed_s, model_s, plan_s, commit_s):
    return Step(4, 4, True, wall_s, waited_s, computed_s, model_s, plan_s, commit_s)


def test_host_time_by_hand(capsys):
    short = host_time_of(128, [step(0.100, 0.096, 0.095, 0.094, 0.001, 0.0005)] * 3)
    assert (short.plan_s, short.commit_s) == (0.001, 0.0005)
    assert short.text_s == pytest.approx(0.0025)
    assert short.rank_s == pytest.approx(0.001)
    assert short.host_s == pytest.approx(0.005)
    assert short.part == pytest.approx(0.05)
    long = host_time_of(4096, [step(0.200, 0.194, 0.193, 0.189, 0.001, 0.0005)])
    assert growth([long, short]) == pytest.approx(2)
    show_results([short, long], parse(["--n", "4"]))
    words = capsys.readouterr().out
    assert "4,096" in words
    assert "missed" in words


def test_the_fake_engine_decodes_at_every_context():
    bench = Bench(EngineConfig(model="fake", max_num_seqs=8, async_scheduling=False))
    try:
        found = [measure(bench, 4, context, output_len=6, rounds=2) for context in (32, 256)]
    finally:
        bench.close()
    for one in found:
        assert one.steps == 2 * 5
        assert 0 < one.plan_s < one.step_s
        assert 0 < one.commit_s < one.step_s
        assert one.host_s >= one.plan_s
        assert one.text_s > 0

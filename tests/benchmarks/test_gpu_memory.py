"""Mixed traffic without a GPU: that it runs, and what is said of its samples."""

import importlib.util
import itertools
import random
from pathlib import Path

import pytest
from gpu_memory import Sample, report, requests, run

from octavo.engine.build import build_engine
from octavo.engine.config import EngineConfig

_spec = importlib.util.spec_from_file_location("tiny", Path(__file__).parents[1] / "models" / "tiny.py")
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)


def test_traffic_runs_and_is_sampled(tmp_path: Path) -> None:
    config = EngineConfig(model=str(tiny.make("llama", tmp_path)), device="cpu", dtype="float32", max_num_seqs=4)
    core = build_engine(config).core
    try:
        samples = list(run(core, tiny.VOCAB, 128, at_once=6, seconds=0.6, every=0.2))
    finally:
        core.close()
    assert len(samples) >= 3
    assert samples[-1].tokens > samples[0].tokens == 0
    assert all(sample.reserved > 0 for sample in samples)


def test_requests_fit_and_differ() -> None:
    made = list(itertools.islice(requests(random.Random(0), 1000, 2048), 300))
    assert all(len(one.prompt_token_ids) + (one.params.max_tokens or 0) <= 2048 for one in made)
    assert len({len(one.prompt_token_ids) for one in made}) > 100
    assert {one.params.n for one in made} == {1, 2}


def test_growth_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    gib = 2**30
    samples = [Sample(minute, 8 * gib, 9 * gib, (10 + minute) * gib, gib, 0, 1, 1, 0) for minute in range(7)]
    report(samples)
    words = capsys.readouterr().out
    assert "10.0%" in words  # 9 of 10 GiB were in use
    assert "From minute 1.0 on: reserved +5,120 MiB, 0 retries" in words

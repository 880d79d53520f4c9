"""The prefix benchmark with the fake engine, and its ratio by hand."""

import asyncio

import pytest
from prefix import Prefix, measure, parse, run_format, show_results, ttft

from octavo.engine import AsyncLLM
from octavo.engine.config import EngineConfig


def test_the_ratio_is_to_the_median_hit(capsys):
    prefixes = [Prefix(1.0, (0.01, 0.02, 0.9), 96), Prefix(2.0, (0.02, 0.02), 112)]
    assert [prefix.ratio for prefix in prefixes] == [pytest.approx(50), pytest.approx(100)]
    show_results({"float32": prefixes, "int8": prefixes[:1] * 2}, parse([]))
    words = capsys.readouterr().out
    assert "75.0" in words
    assert "96" in words
    assert words.count("met") >= 2


def test_all_but_the_last_block_of_a_prefix_is_found():
    prefixes = run_format({"model": "fake", "block_size": 16, "max_num_seqs": 8}, 1, (100, 4, 3, 2))
    assert len(prefixes) == 3
    for prefix in prefixes:
        assert len(prefix.hits_s) == 2
        assert prefix.cached == 96
        assert prefix.cold_s > 0


def test_a_warm_cache_is_not_taken_for_a_cold_one():
    llm = AsyncLLM(EngineConfig(model="fake"))
    try:
        asyncio.run(measure(llm, 64, 4, 1, 1))
        with pytest.raises(SystemExit, match="never seen"):
            asyncio.run(measure(llm, 64, 4, 1, 1))
        seconds, cached = asyncio.run(ttft(llm, list(range(100, 140))))
    finally:
        llm.shutdown()
    assert seconds > 0
    assert cached == 0

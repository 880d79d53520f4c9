"""Resumption on a real model: cut anywhere, the rest on another engine equals the undisturbed run, bit for bit."""

import importlib.util
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.engine.build import build_engine
from octavo.engine.config import EngineConfig
from octavo.engine.params import SamplingParams
from octavo.engine.types import Request, Resumed

_spec = importlib.util.spec_from_file_location("tiny", Path(__file__).parents[1] / "models" / "tiny.py")
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

PROMPTS = tiny.prompts((5, 23, 1, 40))
SETTINGS = {"dtype": "float32", "block_size": 8, "max_model_len": 96, "max_num_seqs": 8, "num_gpu_blocks_override": 200}
numbers = itertools.count()

params = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.7, 1.0, 1.5]),
        "top_k": st.sampled_from([0, 0, 5, 40]),
        "top_p": st.sampled_from([1.0, 0.9]),
        "min_p": st.sampled_from([0.0, 0.05]),
        "presence_penalty": st.sampled_from([0.0, 1.5]),
        "frequency_penalty": st.sampled_from([0.0, 0.8]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "min_tokens": st.sampled_from([0, 6]),
        "max_tokens": st.integers(6, 24),
        "stop_token_ids": st.sampled_from([(), tuple(range(20, 60))]),
        "logprobs": st.sampled_from([None, 3]),
        "prompt_logprobs": st.sampled_from([None, None, 2]),
        "n": st.sampled_from([1, 1, 3]),
        "seed": st.integers(0, 1 << 40),
        "logit_bias": st.sampled_from([{}, {7: 4.0}]),
        "ignore_eos": st.just(True),
    }
)


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """(one that is never cut, one that takes over): the second computes in other chunks and from other blocks."""
    folder = str(tiny.make("qwen3", tmp_path_factory.mktemp("checkpoints")))
    first = build_engine(EngineConfig(model=folder, **SETTINGS)).core
    second = build_engine(EngineConfig(model=folder, **SETTINGS, max_num_batched_tokens=11)).core
    yield first, second
    first.close()
    second.close()


def finish(core, made):
    deltas = core.add(made)
    while core.has_work:
        deltas += core.step()
    assert core.stats().kv_blocks_held == 0
    return deltas


@settings(max_examples=60, deadline=None)
@given(params, st.sampled_from(PROMPTS), st.integers(0, 500), st.booleans())
def test_cut_anywhere(engines, options, prompt, cut, cold):
    first, second = engines
    if options["temperature"] == 0:
        options["n"] = 1
    made = Request(
        f"r{next(numbers)}", tuple(prompt), SamplingParams(**options), cache_salt=str(cold and next(numbers))
    )
    whole = finish(first, made)
    assert all(d.error is None for d in whole)
    before = whole[: cut % len(whole)]
    ended = {d.index for d in before if d.finish_reason}
    tokens = [tuple(t for d in before if d.index == i for t in d.token_ids) for i in range(made.params.n)]
    left = tuple(Resumed(i, tokens[i]) for i in range(made.params.n) if i not in ended)
    both = before + finish(second, replace(made, resume=left))
    for index in range(made.params.n):
        want, got = ([d for d in deltas if d.index == index] for deltas in (whole, both))
        assert [t for d in got for t in d.token_ids] == [t for d in want for t in d.token_ids]
        assert [entry for d in got for entry in d.logprobs] == [entry for d in want for entry in d.logprobs]
        assert [(d.finish_reason, d.stop_reason) for d in got][-1] == (want[-1].finish_reason, want[-1].stop_reason)
    scores = [d.prompt_logprobs for d in both if d.prompt_logprobs is not None]
    assert scores == [d.prompt_logprobs for d in whole if d.prompt_logprobs is not None]

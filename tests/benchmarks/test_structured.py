"""The benchmark of structured output, once through, with the fake engine."""

import argparse

import pytest
from structured import FORMS, KINDS, compare, forms_alone

from octavo.engine.build import build_engine
from octavo.engine.config import EngineConfig


def test_the_fake_engine():
    config = EngineConfig(model="fake:step_ms=0", enable_prefix_caching=False)
    core = build_engine(config).core
    args = argparse.Namespace(model="fake", n=4, input_len=8, output_len=40, rounds=1)
    batches = compare(core, args)
    forms = forms_alone(core, config, args)
    core.close()
    assert batches.keys() == {kind.name for kind in KINDS}
    assert {run["tokens"] for found in batches.values() for run in found["runs"]} == {4 * 40}
    assert batches["plain"]["speed_ratios"] == [pytest.approx(1.0)]
    assert forms.keys() == {"tokenizer_s", *FORMS}

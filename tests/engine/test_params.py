"""SamplingParams: vLLM's names, defaults and ranges; every field refuses what it cannot mean, naming itself."""

from __future__ import annotations

import dataclasses
import math
import pickle

import pytest

from octavo.engine.errors import RequestError
from octavo.engine.params import MIN_TEMPERATURE, SamplingParams

HUGE = 10**400  # JSON can hold it; no float can

VLLM_DEFAULTS = {
    "n": 1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "seed": None,
    "ignore_eos": False,
    "max_tokens": 16,
    "min_tokens": 0,
    "logprobs": None,
    "prompt_logprobs": None,
    "detokenize": True,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "include_stop_str_in_output": False,
    "skip_reading_prefix_cache": None,
}


def test_defaults_are_vllms():
    params = SamplingParams()
    assert {name: getattr(params, name) for name in VLLM_DEFAULTS} == VLLM_DEFAULTS
    lists = {f.name for f in dataclasses.fields(params)} - set(VLLM_DEFAULTS) - {"beams"}  # which is not vLLM's
    others = {"stop", "stop_token_ids", "logit_bias", "allowed_token_ids", "bad_words", "structured_outputs"}
    assert lists == others | {"logprob_token_ids"}
    assert not any(getattr(params, name) for name in lists)


GOOD = {
    "n": [1, 2, 1024],
    "presence_penalty": [-2, -2.0, 0, 2],
    "frequency_penalty": [-2.0, 1.5, 2],
    "repetition_penalty": [0.01, 1, 5.0],
    "temperature": [0, 0.0, 1, 100.0],
    "top_p": [1e-9, 0.5, 1],
    "top_k": [0, 1, 10**12],
    "min_p": [0, 0.5, 1],
    "seed": [0, -(2**63), 2**63 - 1],
    "max_tokens": [1, None, 10**9],
    "min_tokens": [0, 16],
    "logprobs": [None, -1, 0, 20],
    "prompt_logprobs": [None, -1, 0, 20],
    "ignore_eos": [True],
    "skip_reading_prefix_cache": [None, True, False],
}

NOT_A_NUMBER = ["1", True, None, math.nan, math.inf, -math.inf, [1], {}, HUGE, -HUGE]
NOT_AN_INTEGER = ["1", True, 1.0, 1.5, math.nan, [1]]
BAD = {
    "n": [0, -1, 1025, None, HUGE, *NOT_AN_INTEGER],
    "presence_penalty": [-2.001, 2.001, *NOT_A_NUMBER],
    "frequency_penalty": [-2.001, 2.001, *NOT_A_NUMBER],
    "repetition_penalty": [0, 0.0, -1.0, *NOT_A_NUMBER],
    "temperature": [-0.001, -1, *NOT_A_NUMBER],
    "top_p": [0, 0.0, -0.1, 1.0001, *NOT_A_NUMBER],
    "top_k": [-2, None, -1.0, *NOT_AN_INTEGER],
    "min_p": [-0.1, 1.1, *NOT_A_NUMBER],
    "seed": [2**63, -(2**63) - 1, HUGE, *NOT_AN_INTEGER],
    "max_tokens": [0, -1, *NOT_AN_INTEGER],
    "min_tokens": [-1, None, 17, *NOT_AN_INTEGER],  # 17 exceeds max_tokens
    "logprobs": [-2, *NOT_AN_INTEGER],
    "prompt_logprobs": [-2, *NOT_AN_INTEGER],
    "stop": ["", [""], [None], [1], 5, {"a": 1}, {"a"}, True, b"x"],
    "stop_token_ids": [5, "12", [-1], [True], [1.0], ["1"], {1}],
    "allowed_token_ids": [[], 5, "12", [-1], [True], [1.0]],
    "bad_words": ["word", [""], ["  "], [None], [1], 7],
    "ignore_eos": [None, 1, "yes"],
    "detokenize": [None, 0],
    "skip_special_tokens": ["true"],
    "spaces_between_special_tokens": [None],
    "include_stop_str_in_output": [1.0],
    "skip_reading_prefix_cache": [0, "no"],
    "structured_outputs": [{"json": "{}"}, "{}", True, 5],
    "logprob_token_ids": ["5", [1.5], [-1], [True], 5, [3]],
    "beams": [4, {"width": 4}, True],
    "logit_bias": [
        5,
        [],
        [[1, 2]],
        "x",
        {"a": 1},
        {"": 1},
        {"1.5": 1},
        {" 1": 1},
        {"1_0": 1},
        {"-1": 1},
        {"٣": 1},
        {"9" * 5000: 1},
        {-1: 1},
        {True: 1},
        {1.0: 1},
        {None: 1},
        {1: None},
        {1: "2"},
        {1: True},
        {1: math.nan},
    ],
}


def test_every_field_is_covered():
    assert set(BAD) == {field.name for field in dataclasses.fields(SamplingParams)}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in GOOD.items() for value in values])
def test_good_values_are_kept(name: str, value: object):
    assert getattr(SamplingParams(**{name: value}), name) == value


@pytest.mark.parametrize("name", BAD)
def test_bad_values_are_refused_and_the_field_is_named(name: str):
    for value in BAD[name]:
        with pytest.raises(RequestError) as caught:
            SamplingParams(**{name: value})
        assert caught.value.param == name, value
        assert name in caught.value.message, value
        assert caught.value.message.endswith(".")
        assert "\n" not in caught.value.message
        assert len(caught.value.message) < 200 or name == "logit_bias"


def test_what_is_normalised():
    assert SamplingParams(top_k=-1).top_k == 0
    assert SamplingParams(seed=-1).seed is None
    assert SamplingParams(temperature=1e-5).temperature == MIN_TEMPERATURE
    assert SamplingParams(temperature=1e-5, n=3).n == 3
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    for name in ("stop", "stop_token_ids", "allowed_token_ids", "bad_words", "logprob_token_ids"):
        assert getattr(SamplingParams(**{name: None}), name) == ()
    assert SamplingParams(stop_token_ids=[3, 1]).stop_token_ids == (3, 1)
    assert SamplingParams(allowed_token_ids=[3]).allowed_token_ids == (3,)
    assert SamplingParams(logit_bias=None).logit_bias == {}


def test_logit_bias_takes_openais_keys_and_clamps():
    given = {"50256": -100, 7: 1.5, "8": 1e300, 9: -math.inf, "10": HUGE}
    assert SamplingParams(logit_bias=given).logit_bias == {50256: -100.0, 7: 1.5, 8: 100.0, 9: -100.0, 10: 100.0}
    assert all(type(bias) is float for bias in SamplingParams(logit_bias=given).logit_bias.values())


def test_greedy():
    assert SamplingParams(temperature=0).greedy
    assert not SamplingParams(temperature=1e-9).greedy
    with pytest.raises(RequestError, match="n must be 1 when temperature is 0") as caught:
        SamplingParams(temperature=0, n=2)
    assert caught.value.param == "n"


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
def test_needs_penalties(penalty: str):
    assert not SamplingParams().needs_penalties
    assert SamplingParams(**{penalty: 0.5}).needs_penalties


def test_stop_strings_need_text():
    with pytest.raises(RequestError, match="detokenize") as caught:
        SamplingParams(stop="x", detokenize=False)
    assert caught.value.param == "stop"


@pytest.mark.parametrize(
    "given", [{"stop_token_ids": [100]}, {"allowed_token_ids": [5, 100]}, {"logit_bias": {"100": 1}}], ids=str
)
def test_check_vocab(given: dict):
    params = SamplingParams(**given)
    params.check_vocab(101)
    with pytest.raises(RequestError, match="100 is not below the vocabulary size 100") as caught:
        params.check_vocab(100)
    assert caught.value.param in given


def test_min_tokens_may_reach_max_tokens():
    assert SamplingParams(min_tokens=5, max_tokens=5).min_tokens == 5
    assert SamplingParams(min_tokens=5, max_tokens=None).min_tokens == 5
    with pytest.raises(RequestError, match="must not exceed"):
        SamplingParams(min_tokens=6, max_tokens=5)


def test_replace_checks_anew_and_leaves_the_original():
    params = SamplingParams(temperature=0.5, stop="x", logit_bias={1: 2.0})
    changed = params.replace(temperature=0.7)
    assert (params.temperature, changed.temperature, changed.stop, changed.logit_bias) == (0.5, 0.7, ("x",), {1: 2.0})
    with pytest.raises(RequestError):
        params.replace(top_p=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.temperature = 3  # type: ignore[misc]


def test_the_callers_objects_are_not_shared():
    bias, stop = {1: 2.0}, ["a"]
    params = SamplingParams(logit_bias=bias, stop=stop)
    bias[2], stop[0] = 9.0, "b"
    assert (params.logit_bias, params.stop) == ({1: 2.0}, ("a",))


def test_survives_pickling():
    params = SamplingParams(temperature=0.3, logit_bias={"4": 1}, bad_words=["no"], seed=5)
    assert pickle.loads(pickle.dumps(params)) == params

"""Which models can be built, how long their sequences may be, and what a bad config says."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from octavo.engine.errors import ConfigError
from octavo.engine.layers.kv import KVSpec
from octavo.engine.layers.rotary import rope_frequencies, rope_parameters
from octavo.engine.models.registry import MODELS, build_model, max_model_len

sys.path.insert(0, str(Path(__file__).parent))
import tiny
from paged import context


def config(name, **changes):
    made = tiny.config(name)
    made.architectures = [type(made).__name__.replace("TextConfig", "Config").replace("Config", "ForCausalLM")]
    for key, value in changes.items():
        setattr(made, key, value)
    return made


def test_every_family_has_a_case():
    built = {type(tiny.model(name)).__name__ for name in ("gpt2", "opt")}
    named = {tiny.CASES[name][0].removesuffix("Config").removesuffix("Text") for name in tiny.FAMILIES}
    assert built | {f"{name}ForCausalLM" for name in named} >= set(MODELS)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"architectures": ["FalconForCausalLM"]}, "FalconForCausalLM is not supported; supported are Gemma2"),
        ("llama", {"architectures": None}, "model type 'llama'"),
        ("llama", {"hidden_act": "relu6"}, "'relu6' is not supported"),
        ("llama", {"rope_parameters": {"rope_type": "axial", "rope_theta": 1.0}}, "rope_type 'axial'"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1.0}}, "lack 'factor'"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "'chunked_attention' are not supported"),
        ("gemma3", {"use_bidirectional_attention": True}, "bidirectional"),
    ],
)
def test_what_cannot_be_built_says_why(name, changes, message):
    with pytest.raises(ConfigError, match=message):
        build_model(config(name, **changes), context())


def test_kv_specs_declare_windows():
    specs = build_model(config("gemma3"), context()).kv_specs()
    assert specs == tuple(KVSpec(2, 16, "float32", window) for window in (8, None, 8))
    assert specs[0].bytes_per_token == 2 * 2 * 16 * 4


@pytest.mark.parametrize(
    ("name", "length"),
    [("llama", 128), ("llama-linear", 384), ("llama-yarn", 64), ("llama-llama3", 128), ("gemma3", 128), ("gpt2", 128)],
)
def test_max_model_len(name, length):
    assert max_model_len(tiny.config(name)) == length


def test_older_rope_forms_mean_the_same():
    old = SimpleNamespace(
        rope_theta=1000.0,
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        partial_rotary_factor=0.5,
    )
    parameters = rope_parameters(old)
    assert parameters["rope_type"] == "yarn"
    new = {"rope_parameters": {**parameters, "rope_theta": 1000.0}}
    frequencies, scale = rope_frequencies(rope_parameters(SimpleNamespace(**new)), 16, 64, 64)
    again, same = rope_frequencies(parameters, 16, 64, 64)
    assert (frequencies == again).all()
    assert scale == same > 1
    assert len(again) == 4

    bare = rope_parameters(SimpleNamespace(rope_theta=500.0, rope_scaling=None))
    assert (bare["rope_type"], bare["rope_theta"]) == ("default", 500.0)
    su = rope_parameters(SimpleNamespace(rope_scaling={"type": "su", "short_factor": [1.0], "long_factor": [2.0]}))
    with pytest.raises(ConfigError, match="original_max_position_embeddings"):
        rope_frequencies(su, 4, 64, 64)

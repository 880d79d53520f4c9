"""A deployment's YAML: read into typed values, or refused with the key's name."""

import pytest

from octavo.cluster.config import DeploymentConfig, parse_bytes
from octavo.cluster.ingress.reading.formats import CALL_FORMATS, THINKING
from octavo.engine.config import EngineConfig
from octavo.engine.errors import ConfigError

# Family → how it writes calls, where its presets say so.
PARSERS = {"llama": "llama3_json", "mistral": "mistral", "phi": "phi4_mini_json", "qwen": "hermes"}


def test_a_whole_file(tmp_path):
    file = tmp_path / "deployment.yaml"
    file.write_text(
        """
model: org/name
served_model_name: [big, bigger]
api_key: secret
num_replicas: 3
engine:
  dtype: bfloat16
  kv_cache_memory_bytes: 2GiB
  max_model_len: 4096
  enable_prefix_caching: false
limits:
  max_body_bytes: 1MiB
  max_stored_bytes: 0
  request_timeout_s: 30
"""
    )
    config = DeploymentConfig.from_file(file)
    (model,) = config.models
    assert model.engine == EngineConfig(
        model="org/name",
        dtype="bfloat16",
        kv_cache_memory_bytes=2 << 30,
        max_model_len=4096,
        enable_prefix_caching=False,
        max_num_queued_reqs=1024,
    )
    assert model.served_model_name == ("big", "bigger")
    assert config.api_key == ("secret",)
    assert model.num_replicas == 3
    assert config.limits.max_body_bytes == 1 << 20
    assert config.limits.request_timeout_s == 30.0
    assert config.limits.max_stored_bytes == 0


def test_defaults_are_those_of_the_dataclass():
    assert DeploymentConfig.from_mapping({}) == DeploymentConfig()


def test_several_models():
    config = DeploymentConfig.from_mapping(
        {
            "api_key": "k",
            "models": [
                {"model": "org/one", "num_replicas": 2, "routing": {"policy": "least_loaded"}},
                {"model": "two.gguf", "engine": {"block_size": 32}, "autoscaling": {"max_replicas": 4}},
            ],
        }
    )
    one, two = config.models
    assert (one.name, two.name) == ("one", "two")
    assert (one.num_replicas, one.max_replicas, two.max_replicas) == (2, 2, 4)
    assert (one.routing.policy, two.routing.policy) == ("least_loaded", "prefix")
    assert (two.engine.block_size, two.autoscaling.min_replicas, one.autoscaling) == (32, 1, None)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"modell": "x"}, "modell"),
        ({"engine": {"blocksize": 16}}, "engine.blocksize"),
        ({"engine": {"model": "x"}}, "engine.model"),
        ({"engine": {"block_size": "16"}}, "engine.block_size"),
        ({"engine": {"block_size": 17}}, "block_size"),
        ({"engine": {"enable_prefix_caching": 1}}, "engine.enable_prefix_caching"),
        ({"engine": {"dtype": "int4"}}, "engine.dtype"),
        ({"engine": {"kv_cache_memory_bytes": "4 gibibytes"}}, "4 gibibytes"),
        ({"engine": [1]}, "engine"),
        ({"limits": {"max_body_bytes": 0}}, "limits.max_body_bytes"),
        ({"limits": {"max_stored_bytes": -1}}, "limits.max_stored_bytes"),
        ({"limits": {"max_body": 1}}, "limits.max_body"),
        ({"routing": {"policy": "random"}}, "routing.policy"),
        ({"routing": {"polcy": "prefix"}}, "routing.polcy"),
        ({"autoscaling": {"min_replicas": 3, "max_replicas": 2}}, "autoscaling.max_replicas"),
        ({"autoscaling": {"target_kv_usage": 80}}, "autoscaling.target_kv_usage"),
        ({"models": []}, "models"),
        ({"models": {"model": "a"}}, "models"),
        ({"models": [{"model": "a"}], "engine": {}}, "engine belongs to a model"),
        ({"models": [{"model": "a", "engine": {"blocksize": 1}}]}, r"models\[0\].engine.blocksize"),
        ({"models": [{"model": "x/a"}, {"model": "y/a"}]}, "'a' is the name of two models"),
        ({"pattern": "star"}, "pattern"),
        ({"num_replicas": 0}, "num_replicas"),
        ({"num_replicas": True}, "num_replicas"),
        ({"served_model_name": 7}, "served_model_name"),
        ({"tool_call_parser": "xml"}, "tool_call_parser must be one of"),
        ({"reasoning_parser": "deep"}, "reasoning_parser must be one of"),
        ({"api_key": [""]}, "API key"),
    ],
)
def test_what_is_wrong_is_named(values, named):
    with pytest.raises(ConfigError, match=named):
        DeploymentConfig.from_mapping(values)


def test_files_that_are_no_configuration(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        DeploymentConfig.from_file(tmp_path / "missing.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1\nb: 2")
    with pytest.raises(ConfigError, match="not valid YAML"):
        DeploymentConfig.from_file(bad)
    bad.write_text("- 1")
    with pytest.raises(ConfigError, match="mapping"):
        DeploymentConfig.from_file(bad)


@pytest.mark.parametrize(
    ("text", "value"),
    [("512MiB", 512 << 20), ("4GiB", 4 << 30), ("4G", 4 * 10**9), ("1.5gib", 3 << 29), ("100", 100), ("2 kb", 2000)],
)
def test_sizes(text, value):
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "GiB", "4XiB", "-1", "1.2.3G"])
def test_what_is_no_size(text):
    with pytest.raises(ConfigError, match="not a size"):
        parse_bytes(text)


def test_presets_name_parsers_that_exist():
    from octavo.cluster.app import ingress_settings
    from octavo.engine.loader.presets import load_presets

    for name in load_presets():
        config = DeploymentConfig.from_mapping({"model": name})
        settings = ingress_settings(config, config.models[0], name)
        for parser, known in ((settings.tool_call_parser, CALL_FORMATS), (settings.reasoning_parser, THINKING)):
            assert parser is None or parser in known
        assert settings.tool_call_parser == PARSERS.get(name.split("-")[0].rstrip("0123456789."))
    config = DeploymentConfig.from_mapping({"model": "qwen3-8b", "tool_call_parser": "none"})
    assert ingress_settings(config, config.models[0], "q").tool_call_parser == "none"

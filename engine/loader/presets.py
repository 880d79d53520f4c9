"""Presets: models with a short name, described in configs/models/*.yaml."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import octavo.configs
from octavo.engine.errors import ConfigError

_SHA256 = re.compile(r"[0-9a-f]{64}")
_REQUIREMENT = re.compile(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+]+")
_PARSERS = ("tool_call_parser", "reasoning_parser")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, slots=True)
class HubRepo:
    """A model on the Hugging Face hub. file: the one GGUF file of it to use; None: it is a model folder."""

    repo: str
    revision: str | None = None
    file: str | None = None


@dataclass(frozen=True, slots=True)
class PackageMember:
    """A file inside a package on the package index, or a folder. requirement: name==version. member: its path in the
    wheel; a folder's ends with a slash. sha256: of the file; where it is a folder, of the wheel."""

    requirement: str
    member: str
    sha256: str

    @property
    def is_folder(self) -> bool:
        return self.member.endswith("/")


Source = HubRepo | PackageMember


@dataclass(frozen=True, slots=True)
class Preset:
    """A named model. sources: tried in order until one can be had.

    tool_call_parser, reasoning_parser: how it writes calls of tools and marks its thoughts; None = as its chat template
    shows.
    """

    name: str
    served_model_name: str
    sources: tuple[Source, ...]
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None


def load_presets() -> dict[str, Preset]:
    """All presets by name, in order of name. Raises ConfigError naming the file and the key that is wrong."""
    presets: dict[str, Preset] = {}
    # Not importlib.resources: on Python 3.11 it fails on a namespace package that is installed editable.
    folders = [Path(folder) / "models" for folder in octavo.configs.__path__]
    for file in sorted((file for folder in folders for file in folder.glob("*.yaml")), key=lambda file: file.name):
        preset = parse_preset(file.read_text(encoding="utf-8"), f"configs/models/{file.name}")
        if file.stem != preset.name:
            raise ConfigError(f"configs/models/{file.name}: name is {preset.name!r}, but must be the file's name.")
        presets[preset.name] = preset
    return presets


def parse_preset(text: str, where: str) -> Preset:
    """One preset from YAML. where: the file's name for error messages."""
    try:
        fields = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error
    fields = _mapping(fields, ("name", "served_model_name", "sources", *_PARSERS), where)
    name = _text(fields, "name", where)
    entries = fields.get("sources")
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{where}: sources must be a list of at least one source.")
    sources = tuple(_source(entry, f"{where}: source {i}") for i, entry in enumerate(entries, 1))
    served = _text(fields, "served_model_name", where) if "served_model_name" in fields else name
    return Preset(name, served, sources, **{key: _text(fields, key, where) for key in _PARSERS if key in fields})


def _source(entry: Any, where: str) -> Source:
    kind = "pypi" if isinstance(entry, dict) and "pypi" in entry else "hub"
    if kind == "pypi":
        fields = _mapping(entry, ("pypi", "member", "sha256"), where)
        return PackageMember(
            requirement=_text(fields, "pypi", where, _REQUIREMENT, "name==version"),
            member=_text(fields, "member", where),
            sha256=_text(fields, "sha256", where, _SHA256, "64 lower-case hexadecimal digits"),
        )
    fields = _mapping(entry, ("hub", "revision", "file"), where)
    return HubRepo(
        repo=_text(fields, "hub", where, _REPO, "organisation/name"),
        revision=_text(fields, "revision", where) if "revision" in fields else None,
        file=_text(fields, "file", where) if "file" in fields else None,
    )


def _mapping(value: Any, known: tuple[str, ...], where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: expected the keys {', '.join(known)}, got {value!r}.")
    for key in value:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}; known are {', '.join(known)}.")
    return value


def _text(
    fields: dict[str, Any], key: str, where: str, pattern: re.Pattern[str] | None = None, form: str = "text"
) -> str:
    value = fields.get(key)
    if not isinstance(value, str) or not value or (pattern is not None and not pattern.fullmatch(value)):
        raise ConfigError(f"{where}: {key} must be {form}, got {value!r}.")
    return value

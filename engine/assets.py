"""What of a model is not weights: its tokenizer."""

from __future__ import annotations

from octavo.engine.config import EngineConfig
from octavo.engine.loader.source import resolve_model
from octavo.engine.text.byte_tokenizer import ByteTokenizer
from octavo.engine.text.tokenizer import Tokenizer, load_tokenizer


def tokenizer_of(config: EngineConfig) -> Tokenizer:
    """The model's tokenizer, or the one that `config.tokenizer` names. Raises ConfigError if there is none."""
    if config.tokenizer is None and config.is_fake:
        return ByteTokenizer()
    source = resolve_model(config.tokenizer or config.model, revision=config.revision, download_dir=config.download_dir)
    return load_tokenizer(source.path, trust_remote_code=config.trust_remote_code)

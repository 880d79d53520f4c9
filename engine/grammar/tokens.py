"""A tokenizer as llguidance sees it: the bytes of every token, which are special, and how text is cut into tokens."""

from __future__ import annotations

import logging
from typing import Any

from llguidance import LLTokenizer, TokenizerWrapper

from octavo.engine.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


def grammar_tokenizer(tokenizer: Tokenizer, vocab_size: int, eos_token_ids: tuple[int, ...]) -> LLTokenizer:
    """vocab_size: of the model, which may have more tokens than the tokenizer; they are never allowed. eos_token_ids:
    the tokens that end an output; the tokenizer's own if there are none. Takes up to a second for a large vocabulary.
    """
    size = max(vocab_size, tokenizer.vocab_size)
    ends = [token for token in eos_token_ids or tokenizer.eos_token_ids if token < size]
    if not ends:
        # Nothing ends an output but a complete form: a token that no text has stands in for the end.
        size += 1
        ends = [size - 1]
    document = getattr(tokenizer, "document", None)
    if document is not None:
        try:
            return LLTokenizer(document(), n_vocab=size, eos_token=ends)
        except ValueError as error:
            log.info("llguidance does not read this tokenizer's file (%s): it gets the tokens' bytes", error)
    # The stubs want a TokenizerWrapper, whose constructor takes what has these attributes.
    return LLTokenizer(TokenizerWrapper(_Bytes(tokenizer, size, ends)), n_vocab=size, eos_token=ends)


class _Bytes:
    """What TokenizerWrapper asks for."""

    def __init__(self, tokenizer: Tokenizer, size: int, ends: list[int]) -> None:
        self._tokenizer = tokenizer
        known = range(tokenizer.vocab_size)
        self.eos_token_id, self.bos_token_id = ends[0], tokenizer.bos_token_id
        self.special_token_ids = [token for token in known if tokenizer.is_special(token)]
        special = frozenset(self.special_token_ids)
        names = tokenizer.convert_ids_to_tokens(self.special_token_ids)
        spelled = dict(zip(self.special_token_ids, names, strict=True))
        self.tokens = [spelled[token].encode() if token in special else tokenizer.token_bytes(token) for token in known]
        self.tokens += [b""] * (size - len(self.tokens))

    def __call__(self, text: Any) -> list[int]:
        plain = text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
        return self._tokenizer.encode(plain, add_special_tokens=False)

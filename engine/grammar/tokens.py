"""A tokenizer as llguidance sees it: the bytes of every token, which are special, and how text is cut into tokens."""

from __future__ import annotations

import logging

from llguidance import LLTokenizer, TokenizerWrapper

from octavo.engine.errors import RequestError
from octavo.engine.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_PROBES = ('{"', "} ]", "word and wörd", ' "a": 1')


def grammar_tokenizer(tokenizer: Tokenizer, vocab_size: int, eos_token_ids: tuple[int, ...]) -> LLTokenizer:
    """vocab_size: of the model, which may have more tokens than the tokenizer; they are never allowed. eos_token_ids:
    the tokens that end an output; the tokenizer's own if there are none. Takes up to a second for a large vocabulary.

    Raises RequestError for a tokenizer whose text is not the bytes of its tokens: nothing could be promised of it.
    """
    if tokenizer.pieces is None:
        raise RequestError(
            "This model has no structured output: its tokenizer's text is not made of its tokens' bytes.",
            "structured_outputs",
        )
    size = max(vocab_size, tokenizer.vocab_size)
    ends = [token for token in eos_token_ids or tokenizer.eos_token_ids if token < size]
    if not ends:
        # Nothing ends an output but a complete form: a token that no text has stands in for the end.
        size += 1
        ends = [size - 1]
    document = getattr(tokenizer, "document", None)
    if document is not None:
        try:
            made = LLTokenizer(document(), n_vocab=size, eos_token=ends)
        except ValueError as error:
            log.info("llguidance does not read this tokenizer's file (%s): it gets the tokens' bytes", error)
        else:
            # One that puts a space before every text could not say how a forced text goes on.
            if all(made.decode_bytes(made.tokenize_str(text)) == text.encode() for text in _PROBES):
                return made
    return LLTokenizer(TokenizerWrapper(_Bytes(tokenizer, size, ends)), n_vocab=size, eos_token=ends)


class _Bytes:
    """What TokenizerWrapper asks for. Texts that the tokenizer would change are cut into the longest tokens."""

    def __init__(self, tokenizer: Tokenizer, size: int, ends: list[int]) -> None:
        self._tokenizer = tokenizer
        known = range(tokenizer.vocab_size)
        self.eos_token_id, self.bos_token_id = ends[0], tokenizer.bos_token_id
        self.special_token_ids = [token for token in known if tokenizer.is_special(token)]
        names = tokenizer.convert_ids_to_tokens(self.special_token_ids)
        special = dict(zip(self.special_token_ids, names, strict=True))
        self.tokens = [special[token].encode() if token in special else tokenizer.token_bytes(token) for token in known]
        plain = [token for token in reversed(known) if token not in special and self.tokens[token]]
        self._ids = {self.tokens[token]: token for token in plain}  # of equal ones the first
        self._longest = max(map(len, self._ids), default=1)
        self.tokens += [b""] * (size - len(self.tokens))

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):  # TokenizerWrapper tries bytes; without them it cuts texts between characters
            raise TypeError("a text is wanted")
        ids, wanted = self._tokenizer.encode(text, add_special_tokens=False), text.encode()
        return ids if b"".join(self.tokens[token] for token in ids) == wanted else self._cut(wanted)

    def _cut(self, text: bytes) -> list[int]:
        ids, at = [], 0
        while at < len(text):
            sizes = range(min(self._longest, len(text) - at), 0, -1)
            found = next((size for size in sizes if text[at : at + size] in self._ids), None)
            if found is None:
                break
            ids.append(self._ids[text[at : at + found]])
            at += found
        return ids

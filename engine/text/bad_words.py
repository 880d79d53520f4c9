"""Bad words → the token sequences that must not be drawn."""

from __future__ import annotations

from collections.abc import Sequence

from octavo.engine.errors import RequestError
from octavo.engine.text.tokenizer import Tokenizer


def bad_words_token_ids(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Each word as it is spelled at the beginning of a text and, where that is a spelling of its own, after a space.

    As in vLLM, the spelling after a space counts only if it has as many tokens and another first one: then the space is
    part of the first token, and not a token that may stand before any word. Raises RequestError for a word that has no
    tokens.
    """
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        plain = tuple(tokenizer.encode(word.lstrip(), add_special_tokens=False))
        if not plain:
            raise RequestError(f"bad_words: {word!r} has no tokens.", "bad_words")
        found[plain] = None
        spaced = tuple(tokenizer.encode(" " + word.lstrip(), add_special_tokens=False))
        if len(spaced) == len(plain) and spaced[0] != plain[0]:
            found[spaced] = None
    return tuple(found)

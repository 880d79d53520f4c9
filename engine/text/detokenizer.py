"""Token ids → text, token by token, never half a character.

Two ways. Where text is the tokens' bytes (BytePieces), each token's bytes go through an incremental UTF-8 decoder:
exact, and a dictionary lookup per token. Otherwise a window of the last tokens is decoded with the tokenizer and
compared with what it gave before: the tokens in front of the new ones are there because a tokenizer may treat the
beginning of a text in its own way.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

from octavo.engine.text.pieces import BytePieces, LeadingSpace
from octavo.engine.text.tokenizer import Tokenizer

_REPLACEMENT = "�"
_CONTEXT = 6  # prompt tokens that a window starts with
_MAX_PENDING = 24  # tokens a window may hold back; a character has 4 bytes
_LONGEST_PARTIAL = 3  # bytes of a character that is not yet whole


class Detokenizer(Protocol):
    """One sequence's text. The increments of `push` and the one of `finish` together are the whole text."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens make certain."""

    def finish(self) -> str:
        """No more tokens: what was held back, U+FFFD for bytes that never became a character."""


def make_detokenizer(
    tokenizer: Tokenizer,
    prompt_token_ids: Sequence[int] = (),
    skip_special_tokens: bool = True,
    spaces_between_special_tokens: bool = True,
    shown_tokens: frozenset[int] = frozenset(),
) -> Detokenizer:
    """For tokens that follow `prompt_token_ids`, whose own text is not given out. shown_tokens: special tokens that are
    never skipped.

    The text is decode(prompt + tokens) without decode(prompt), so with a prompt the first word keeps its space.
    """
    if tokenizer.pieces is not None:
        return _PieceDetokenizer(tokenizer, tokenizer.pieces, prompt_token_ids, skip_special_tokens, shown_tokens)
    return _WindowDetokenizer(
        tokenizer, prompt_token_ids, skip_special_tokens, spaces_between_special_tokens, shown_tokens
    )


class _PieceDetokenizer:
    def __init__(
        self,
        tokenizer: Tokenizer,
        pieces: BytePieces,
        prompt: Sequence[int],
        skip_special: bool,
        shown: frozenset[int],
    ) -> None:
        self._pieces = pieces
        self._skipped = _skips(tokenizer, skip_special, shown)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = not any(map(self._counts, prompt))
        # What to take off the first text there is.
        self._unwanted = " " if self._at_start and pieces.leading_space is LeadingSpace.STRIP_ONE else ""
        if not self._at_start and (partial := _partial_character(b"".join(self._last_bytes(prompt)))):
            # The prompt ends inside a character. If our first bytes complete it, it is ours; if not, it is U+FFFD, and
            # the prompt's.
            self._utf8.decode(partial)
            self._unwanted = _REPLACEMENT

    def push(self, token_ids: Sequence[int]) -> str:
        data = b"".join(map(self._bytes_of, token_ids))
        return self._strip(self._utf8.decode(data))

    def finish(self) -> str:
        return self._strip(self._utf8.decode(b"", final=True))

    def _counts(self, token_id: int) -> bool:
        return not self._skipped(token_id) and self._pieces.exists(token_id)

    def _bytes_of(self, token_id: int) -> bytes:
        if self._skipped(token_id):
            return b""
        if self._at_start and self._pieces.exists(token_id):
            self._at_start = False
            return self._pieces.first_bytes_of(token_id)
        return self._pieces.bytes_of(token_id)

    def _strip(self, text: str) -> str:
        if self._unwanted and text:
            text, self._unwanted = text.removeprefix(self._unwanted), ""
        return text

    def _last_bytes(self, prompt: Sequence[int]) -> list[bytes]:
        """Bytes of the prompt's last tokens, enough of them to hold a partial character."""
        found: list[bytes] = []
        for token_id in reversed(prompt):
            if not self._skipped(token_id):
                found.insert(0, self._pieces.bytes_of(token_id))
            if sum(map(len, found)) >= _LONGEST_PARTIAL:
                break
        return found


def _partial_character(data: bytes) -> bytes:
    """The bytes at the end of `data` that begin a character without ending it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(data)
    return decoder.getstate()[0]


def _skips(tokenizer: Tokenizer, skip_special: bool, shown: frozenset[int]) -> Callable[[int], bool]:
    """Which tokens are skipped."""
    if not skip_special:
        return _never
    if not shown:
        return tokenizer.is_special
    return lambda token_id: token_id not in shown and tokenizer.is_special(token_id)


def _never(token_id: int) -> bool:
    return False


class _WindowDetokenizer:
    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        skip_special: bool,
        spaces_between: bool,
        shown: frozenset[int],
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = _skips(tokenizer, skip_special, shown)
        self._skip = skip_special and not shown  # what is left of the tokens is to be seen
        self._spaces = spaces_between
        # The window: tokens whose text is out, then tokens that are held back. `_shown` is the former's text.
        self._window = self._kept(prompt)[-_CONTEXT:]
        self._num_shown = len(self._window)
        self._shown = self._decode(self._window)

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join(self._push_one(token_id) for token_id in self._kept(token_ids))

    def finish(self) -> str:
        text = self._decode(self._window)
        return text[len(self._shown) :]

    def _push_one(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        pending = len(self._window) - self._num_shown
        undecided = len(text) <= len(self._shown) or text.endswith(_REPLACEMENT)
        if undecided and pending < _MAX_PENDING:
            return ""
        # Held back this long, it is no character in the making; without a bound a stream of bad bytes costs O(n²).
        new = text[len(self._shown) :]
        self._window = self._window[self._num_shown :]
        self._num_shown = len(self._window)
        self._shown = self._decode(self._window)
        return new

    def _kept(self, token_ids: Sequence[int]) -> list[int]:
        return [i for i in token_ids if not self._skipped(i)]

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, self._skip, self._spaces) if token_ids else ""

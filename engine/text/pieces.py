"""BytePieces: a tokenizer whose text is the bytes of its tokens, one after the other.

True of byte-level BPE and of SentencePiece with byte fallback, which is nearly every language model. Then a token's
bytes can be looked up, and text can be decoded one token at a time, exactly. Knows the decoders of the `tokenizers`
library by their JSON; the one place where text is not the concatenation is the leading space that SentencePiece adds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


class LeadingSpace(Enum):
    """What decoding drops at the very beginning of a text."""

    KEEP = "nothing"
    STRIP_ONE = "one space"
    STRIP_TOKEN = "every space mark of the first token"


class BytePieces:
    """token id → bytes. Ids without a token stand for no bytes.

    spell: id → the raw vocabulary string, None if there is no such token.
    to_bytes: raw vocabulary string → bytes.
    """

    def __init__(
        self,
        spell: Callable[[int], str | None],
        to_bytes: Callable[[str], bytes],
        leading_space: LeadingSpace = LeadingSpace.KEEP,
        space_mark: str = "",
    ) -> None:
        self.leading_space = leading_space
        self._spell = spell
        self._to_bytes = to_bytes
        self._space_mark = space_mark
        self._known: dict[int, bytes] = {}  # at most one entry per vocabulary entry

    def bytes_of(self, token_id: int) -> bytes:
        """A token's bytes anywhere but at the beginning of a text."""
        known = self._known.get(token_id)
        if known is None:
            token = self._spell(token_id)
            if token is None:
                return b""  # not kept: a client may name any number
            known = self._known[token_id] = self._to_bytes(token)
        return known

    def exists(self, token_id: int) -> bool:
        return token_id in self._known or self._spell(token_id) is not None

    def first_bytes_of(self, token_id: int) -> bytes:
        """A token's bytes as the first of a text; the space that STRIP_ONE takes from the whole text is still there."""
        if self.leading_space is not LeadingSpace.STRIP_TOKEN:
            return self.bytes_of(token_id)
        token = self._spell(token_id)
        return b"" if token is None else self._to_bytes(token.replace(self._space_mark, ""))

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of the tokens that exist among `token_ids`; bytes that are no UTF-8 become U+FFFD."""
        ids = [i for i in token_ids if self.exists(i)]
        if not ids:
            return ""
        rest = map(self.bytes_of, ids[1:])
        text = b"".join((self.first_bytes_of(ids[0]), *rest)).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.leading_space is LeadingSpace.STRIP_ONE else text


def pieces_of_decoder(decoder: dict[str, Any] | None, spell: Callable[[int], str | None]) -> BytePieces | None:
    """The BytePieces that do what `decoder` (its part of tokenizer.json) does; None if it is not of that kind."""
    if decoder is None:
        return None
    chain = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    steps: list[Callable[[str], str]] = []
    leading, mark, fused, byte_level, byte_fallback = LeadingSpace.KEEP, "", False, False, False
    for part in chain:
        kind = part["type"]
        if kind == "ByteLevel" and not steps and not fused:
            byte_level = True
        elif kind == "Replace" and "String" in part["pattern"] and not (byte_level or byte_fallback or fused):
            steps.append(_replace(part["pattern"]["String"], part["content"]))
        elif kind == "Metaspace" and not (byte_level or byte_fallback or fused):
            mark = part["replacement"]
            steps.append(_replace(mark, " "))
            if part.get("prepend_scheme", "always") != "never" and part.get("add_prefix_space", True):
                leading = LeadingSpace.STRIP_TOKEN
        elif kind == "ByteFallback" and not (byte_level or fused):
            byte_fallback = True
        elif kind == "Fuse":
            fused = True
        elif kind == "Strip" and fused and part["content"] == " " and (part["start"], part["stop"]) == (1, 0):
            leading = LeadingSpace.STRIP_ONE
        else:
            return None
    if byte_level:
        return BytePieces(spell, _byte_level_bytes, leading, mark)
    return BytePieces(spell, _text_bytes(steps, byte_fallback), leading, mark)


def _replace(old: str, new: str) -> Callable[[str], str]:
    return lambda token: token.replace(old, new)


def _text_bytes(steps: list[Callable[[str], str]], byte_fallback: bool) -> Callable[[str], bytes]:
    def to_bytes(token: str) -> bytes:
        for step in steps:
            token = step(token)
        if byte_fallback and (byte := _BYTE_TOKEN.match(token)):
            return bytes([int(byte[1], 16)])
        return token.encode()

    return to_bytes


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of the 256 bytes as visible characters: themselves where visible, else from U+0100 upwards."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(b): b for b in visible} | {chr(0x100 + n): b for n, b in enumerate(hidden)}


_BYTES = _byte_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([_BYTES[char] for char in token])
    except KeyError:  # an added token, spelled as it is
        return token.encode()

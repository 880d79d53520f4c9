"""ByteTokenizer: every byte is a token. No files, no training; for the fake model and for tests.

Ids 0 … 255 are the bytes, 256 begins a text, 257 ends it, 258 and 259 bracket a chat message, 260 pads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from octavo.engine.errors import RequestError
from octavo.engine.text.chat import ChatTemplates
from octavo.engine.text.marked import Marked
from octavo.engine.text.pieces import BytePieces

BOS, EOS = 256, 257
_SPECIAL = ("<|bos|>", "<|eos|>", "<|start|>", "<|end|>", "<|pad|>")
_IDS = {name: 256 + number for number, name in enumerate(_SPECIAL)}
_FIND_SPECIAL = re.compile("(" + "|".join(map(re.escape, _SPECIAL)) + ")")
_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


class ByteTokenizer:
    """A Tokenizer (see tokenizer.py). `encode` puts the beginning token first when special tokens are wanted."""

    vocab_size = 256 + len(_SPECIAL)
    bos_token_id: int | None = BOS
    eos_token_ids: tuple[int, ...] = (EOS,)

    def __init__(self) -> None:
        self._chat = ChatTemplates({"default": _TEMPLATE}, {"bos_token": _SPECIAL[0], "eos_token": _SPECIAL[1]})
        self.pieces: BytePieces | None = BytePieces(self._spell, _to_bytes)

    @property
    def chat_template(self) -> str | None:
        return self._chat.default

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = [BOS] if add_special_tokens else []
        try:
            for number, part in enumerate(_FIND_SPECIAL.split(text)):
                if number % 2:  # the matches stand between what is left
                    ids.append(_IDS[part])
                else:
                    ids.extend(part.encode())
        except UnicodeEncodeError as error:
            raise RequestError("The text is no valid Unicode: it holds lone surrogates.", "prompt") from error
        return ids

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        return [self.encode(text, add_special_tokens) for text in texts]

    def mark_batch(
        self, texts: Sequence[tuple[str] | tuple[str, str]], add_special_tokens: bool = True
    ) -> list[Marked]:
        made = []
        for text in texts:
            parts = [self.encode(part, add_special_tokens=False) for part in text]
            begin = [BOS] if add_special_tokens else []
            sources = [None] * len(begin) + [number for number, part in enumerate(parts) for _ in part]
            ids = [*begin, *(token for part in parts for token in part)]
            made.append(Marked(ids, sources, [0] * len(ids)))
        return made

    def decode(
        self, ids: Sequence[int], skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> str:
        return b"".join(self.token_bytes(i) for i in ids if i < 256 or not skip_special_tokens).decode(
            "utf-8", "replace"
        )

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [self._spell(token_id) or "" for token_id in ids]

    def token_bytes(self, token_id: int) -> bytes:
        token = self._spell(token_id)
        return b"" if token is None else _to_bytes(token)

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def is_special(self, token_id: int) -> bool:
        return 256 <= token_id < self.vocab_size

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> str:
        return self._chat.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template=chat_template,
            **kwargs,
        )

    def _spell(self, token_id: int) -> str | None:
        if 0 <= token_id < 256:
            return f"<0x{token_id:02X}>"
        return _SPECIAL[token_id - 256] if self.is_special(token_id) else None


def _to_bytes(token: str) -> bytes:
    return token.encode() if token in _IDS else bytes([int(token[3:5], 16)])

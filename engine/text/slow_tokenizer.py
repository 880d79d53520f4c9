"""Tokenizers that only transformers can read: sentencepiece models, vocab + merges files, remote code.

What transformers turns into a `tokenizers` backend becomes a FastTokenizer; the others are wrapped as they are.
Importing transformers takes a second or more, so nobody imports this module before it is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from octavo.engine.errors import ConfigError, RequestError
from octavo.engine.text.chat import ChatTemplates
from octavo.engine.text.fast_tokenizer import FastTokenizer
from octavo.engine.text.marked import Marked
from octavo.engine.text.pieces import BytePieces


def load_with_transformers(path: Path, *, trust_remote_code: bool = False) -> FastTokenizer | SlowTokenizer:
    """Raises ConfigError with transformers' own reason if it cannot load the folder."""
    try:
        loaded = AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # transformers raises what its parts raise
        raise ConfigError(f"There is no tokenizer in {path} that transformers can load: {error}") from error
    special_tokens = {name: token for name, token in loaded.special_tokens_map.items() if isinstance(token, str)}
    given = loaded.chat_template
    by_name = given if isinstance(given, dict) else {"default": given} if given else {}
    chat = ChatTemplates(by_name, special_tokens)
    backend = getattr(loaded, "backend_tokenizer", None)
    return FastTokenizer(backend, chat) if backend is not None else SlowTokenizer(loaded, chat)


class SlowTokenizer:
    """A Tokenizer (see tokenizer.py) over one of transformers' Python tokenizers."""

    def __init__(self, wrapped: Any, chat: ChatTemplates) -> None:
        self._wrapped = wrapped
        self._chat = chat
        self._special = frozenset(wrapped.all_special_ids)
        self.pieces: BytePieces | None = None  # its rules are Python code
        self.vocab_size: int = len(wrapped)
        self.bos_token_id: int | None = wrapped.bos_token_id
        eos = wrapped.eos_token_id
        self.eos_token_ids: tuple[int, ...] = () if eos is None else (eos,)

    @property
    def chat_template(self) -> str | None:
        return self._chat.default

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        try:
            return list(self._wrapped.encode(text, add_special_tokens=add_special_tokens))
        except UnicodeEncodeError as error:
            raise RequestError("The text is no valid Unicode: it holds lone surrogates.", "prompt") from error

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        return [self.encode(text, add_special_tokens) for text in texts]

    def mark_batch(
        self, texts: Sequence[tuple[str] | tuple[str, str]], add_special_tokens: bool = True
    ) -> list[Marked]:
        try:
            return [self._mark(*text, add_special_tokens=add_special_tokens) for text in texts]
        except UnicodeEncodeError as error:
            raise RequestError("The text is no valid Unicode: it holds lone surrogates.", "prompt") from error

    def _mark(self, first: str, second: str | None = None, *, add_special_tokens: bool) -> Marked:
        made = self._wrapped(
            first,
            second,
            add_special_tokens=add_special_tokens,
            return_token_type_ids=True,
            return_special_tokens_mask=True,
        )
        length = len(self._wrapped.encode(first, add_special_tokens=False))
        sources: list[int | None] = []
        seen = 0
        for put_there in made["special_tokens_mask"]:
            sources.append(None if put_there else int(seen >= length))
            seen += not put_there
        return Marked(made["input_ids"], sources, made["token_type_ids"])

    def decode(
        self, ids: Sequence[int], skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> str:
        known = [i for i in ids if 0 <= i < self.vocab_size]
        options = {"spaces_between_special_tokens": spaces_between_special_tokens}
        return str(self._wrapped.decode(known, skip_special_tokens=skip_special_tokens, **options))

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [str(self._wrapped.convert_ids_to_tokens(i)) if 0 <= i < self.vocab_size else "" for i in ids]

    def token_bytes(self, token_id: int) -> bytes:
        return self.token_text(token_id).encode()

    def token_text(self, token_id: int) -> str:
        text = self.decode([token_id], skip_special_tokens=False)
        spelled = self.convert_ids_to_tokens([token_id])[0]
        # Decoded alone, a word-starting piece loses the space it has inside a text.
        return f" {text}" if spelled.startswith("▁") and not text.startswith(" ") else text

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

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

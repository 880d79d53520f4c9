"""What the server asks of a tokenizer, and how one is loaded from local files.

Start-up time matters: `tokenizer.json` and GGUF vocabularies are read without importing transformers or torch, which
take seconds. Only folders without a tokenizer.json need transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from octavo.engine.errors import ConfigError
from octavo.engine.text.marked import Marked
from octavo.engine.text.pieces import BytePieces


class Tokenizer(Protocol):
    """Text ⇄ token ids, and messages → text. Safe to call from several threads; long encodes release the GIL.

    vocab_size: number of tokens, added ones included. eos_token_ids: tokens that end a text or a turn, as the
    tokenizer's files say. chat_template: the default one's source. pieces: how text is made of the tokens' bytes, None
    if it is not.
    """

    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...
    @property
    def chat_template(self) -> str | None: ...
    @property
    def pieces(self) -> BytePieces | None: ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Raises RequestError for text that is no Unicode (lone surrogates)."""

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of each, on several cores where the tokenizer can."""

    def mark_batch(
        self, texts: Sequence[tuple[str] | tuple[str, str]], add_special_tokens: bool = True
    ) -> list[Marked]:
        """Texts, or pairs of texts that are read together, with where each token comes from."""

    def decode(
        self, ids: Sequence[int], skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> str:
        """Text of `ids`. Ids without a token add nothing; bytes that are no UTF-8 become U+FFFD.

        spaces_between_special_tokens only matters to tokenizers that put spaces there (some slow ones of transformers).
        """

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """Vocabulary strings as they are spelled (Ġ, ▁, <0x0A>); "" for ids without a token."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token adds inside a text: OpenAI's `bytes` of a logprob."""

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text, U+FFFD where a token is part of a character. Special tokens by their names."""

    def is_special(self, token_id: int) -> bool: ...

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
        """The prompt for `messages`; encode it with add_special_tokens=False, templates write their own.

        See octavo.engine.text.chat.ChatTemplates.render.
        """


def load_tokenizer(path: Path | str, *, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer of a local Hugging Face folder or a local `.gguf` file.

    Raises ConfigError if there is none, or none that can be read.
    """
    from octavo.engine.text.fast_tokenizer import load_document, load_folder

    path = Path(path)
    if path.is_file() and path.suffix == ".gguf":
        from octavo.engine.text.gguf_tokenizer import convert, converted_folder

        folder = converted_folder(path)
        return load_folder(folder) if folder is not None else load_document(*convert(path))
    if not path.is_dir():
        raise ConfigError(f"There is no tokenizer folder and no .gguf file at {path}.")
    if (path / "tokenizer.json").is_file():
        return load_folder(path)
    from octavo.engine.text.slow_tokenizer import load_with_transformers

    return load_with_transformers(path, trust_remote_code=trust_remote_code)

"""FastTokenizer: a `tokenizers` backend with the settings of its tokenizer_config.json.

Knows Hugging Face's tokenizer files. Imports neither transformers nor torch. Follows transformers 5 in what the config
file adds to tokenizer.json: special tokens and chat templates. Its add_bos_token and add_eos_token are without effect
then, as there: what tokenizer.json puts around a text is what counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from octavo.engine.errors import ConfigError, RequestError
from octavo.engine.text.chat import ChatTemplates
from octavo.engine.text.marked import Marked
from octavo.engine.text.pieces import BytePieces, pieces_of_decoder

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
Json = dict[str, Any]


class FastTokenizer:
    """A Tokenizer (see tokenizer.py) over a `tokenizers.Tokenizer`, which it takes over."""

    def __init__(
        self, backend: tokenizers.Tokenizer, chat: ChatTemplates, end_tokens: Iterable[str | int] = ()
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._chat = chat
        added = backend.get_added_tokens_decoder()
        self._special = frozenset(token_id for token_id, token in added.items() if token.special)
        decoder = backend.decoder
        self._decoder: Json | None = json.loads(decoder.__getstate__()) if decoder is not None else None
        self.pieces: BytePieces | None = pieces_of_decoder(self._decoder, self._spell)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.bos_token_id: int | None = self._id(chat.special_tokens.get("bos_token"))
        ends = [self._id(token) for token in (chat.special_tokens.get("eos_token"), *end_tokens)]
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys(i for i in ends if i is not None))

    @property
    def chat_template(self) -> str | None:
        return self._chat.default

    def document(self) -> str:
        """What a tokenizer.json has, as JSON text."""
        return str(self._backend.to_str())

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        # The library's encode() holds the GIL; encode_batch_fast() releases it, and computes no offsets.
        try:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        except (UnicodeEncodeError, TypeError) as error:
            raise RequestError("The text is no valid Unicode: it holds lone surrogates.", "prompt") from error
        return [encoding.ids for encoding in encodings]

    def mark_batch(
        self, texts: Sequence[tuple[str] | tuple[str, str]], add_special_tokens: bool = True
    ) -> list[Marked]:
        wanted = [text[0] if len(text) == 1 else text for text in texts]
        try:
            encodings = self._backend.encode_batch_fast(wanted, add_special_tokens=add_special_tokens)
        except (UnicodeEncodeError, TypeError) as error:
            raise RequestError("The text is no valid Unicode: it holds lone surrogates.", "prompt") from error
        return [Marked(each.ids, each.sequence_ids, each.type_ids) for each in encodings]

    def decode(
        self, ids: Sequence[int], skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> str:
        try:
            text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        except OverflowError as error:
            raise RequestError("Token ids must be at least 0.", "tokens") from error
        if "�" in text and self.pieces is not None:
            # The library's byte fallback spoils the good bytes next to a bad one; a stream, which has shown the good
            # ones already, could not agree with it.
            return self.pieces.decode([i for i in ids if not (skip_special_tokens and i in self._special)])
        return text

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [self._spell(token_id) or "" for token_id in ids]

    def token_bytes(self, token_id: int) -> bytes:
        if self.pieces is not None:
            return self.pieces.bytes_of(token_id)
        return self.decode([token_id], skip_special_tokens=False).encode()

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", "replace")

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

    def _spell(self, token_id: int) -> str | None:
        return self._backend.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None

    def _id(self, token: str | int | None) -> int | None:
        if isinstance(token, int):
            return token
        return None if token is None else self._backend.token_to_id(token)


def load_folder(folder: Path) -> FastTokenizer:
    """From a folder with a tokenizer.json. Raises ConfigError if a file in it is damaged."""
    try:
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exceptions
        raise ConfigError(f"{folder / 'tokenizer.json'} cannot be read: {error}.") from error
    return _configured(backend, _read_config(folder), folder)


def load_document(tokenizer: Json, config: Json) -> FastTokenizer:
    """From the contents of tokenizer.json and tokenizer_config.json."""
    return _configured(tokenizers.Tokenizer.from_str(json.dumps(tokenizer)), config, None)


def chat_templates(config: Json, folder: Path | None, special_tokens: Mapping[str, str]) -> ChatTemplates:
    """The templates of a tokenizer_config.json and of the files beside it; the files win, as in transformers."""
    given = config.get("chat_template")
    by_name: dict[str, str] = {}
    if isinstance(given, str):
        by_name["default"] = given
    elif isinstance(given, list):
        by_name.update((entry["name"], entry["template"]) for entry in given)
    elif isinstance(given, dict):
        by_name.update(given)
    if folder is not None:
        if (single := folder / "chat_template.json").is_file():
            by_name["default"] = str(_read_json(single)["chat_template"])
        if (single := folder / "chat_template.jinja").is_file():
            by_name["default"] = single.read_text(encoding="utf-8")
        for further in sorted((folder / "additional_chat_templates").glob("*.jinja")):
            by_name[further.stem] = further.read_text(encoding="utf-8")
    return ChatTemplates(by_name, special_tokens)


def _configured(backend: tokenizers.Tokenizer, config: Json, folder: Path | None) -> FastTokenizer:
    special_tokens = {name: _content(config[name]) for name in _NAMED if config.get(name)}
    _add_tokens(backend, config, special_tokens)
    end_tokens: list[str | int] = list(config.get("octavo_end_tokens", ()))
    if folder is not None:
        end_tokens += _generation_ends(folder)
    return FastTokenizer(backend, chat_templates(config, folder, special_tokens), end_tokens)


def _read_config(folder: Path) -> Json:
    path = folder / "tokenizer_config.json"
    config = _read_json(path) if path.is_file() else {}
    legacy = folder / "special_tokens_map.json"
    if legacy.is_file() and "added_tokens_decoder" not in config:
        config |= {key: value for key, value in _read_json(legacy).items() if key in _NAMED}
    return config


def _generation_ends(folder: Path) -> list[int]:
    path = folder / "generation_config.json"
    ends = _read_json(path).get("eos_token_id") if path.is_file() else None
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _read_json(path: Path) -> Json:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object.")
    return value


def _content(token: str | Json) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _add_tokens(backend: tokenizers.Tokenizer, config: Json, special_tokens: Mapping[str, str]) -> None:
    """Tokens that the config knows and tokenizer.json does not, in the order of their ids."""
    known = {token.content: token.special for token in backend.get_added_tokens_decoder().values()}
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    listed = sorted((config.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0]))
    new = [
        AddedToken(entry["content"], **{flag: entry[flag] for flag in flags if flag in entry})
        for _, entry in listed
        if known.get(entry["content"]) is not entry.get("special", False)
    ]
    extra = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    named = [*special_tokens.values(), *map(_content, extra.values() if isinstance(extra, dict) else extra)]
    listed_names = {token.content for token in new if token.special}
    missing = [name for name in dict.fromkeys(named) if not known.get(name) and name not in listed_names]
    new += [AddedToken(name, special=True, normalized=False) for name in missing]
    for token in new:
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])

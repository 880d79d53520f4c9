"""Turns a GGUF file's vocabulary into a tokenizer folder (tokenizer.json, tokenizer_config.json), and keeps it.

Knows what llama.cpp's `tokenizer.ggml.*` keys mean and how the `tokenizers` library writes the same things down. Where
transformers and llama.cpp read a file differently, llama.cpp is followed: GGUF is its format.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from octavo.engine.env import cache_dir
from octavo.engine.errors import ConfigError
from octavo.engine.loader.gguf_header import read_header
from octavo.engine.text.gguf_splits import SPLITS

logger = logging.getLogger(__name__)

# Part of the cache key: raise it whenever the conversion gives something else for the same file.
_CONVERSION = 1
_HEAD_BYTES = 1 << 20
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # tokenizer.ggml.token_type
_WORD_START = "▁"  # SentencePiece's visible space
Json = dict[str, Any]


def converted_folder(path: Path) -> Path | None:
    """The folder with `path`'s tokenizer, converted now if it was not before; None if the cache cannot be written.

    The key is the file's size, modification time and the hash of its first MiB, where the metadata starts: parsing the
    vocabulary to find out whether it changed would cost what the cache saves.
    """
    folder = cache_dir() / "tokenizers" / _key(path)
    if (folder / "tokenizer.json").is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    except OSError as error:
        logger.warning("The tokenizer cache %s cannot be written (%s): start-up will be slower.", folder.parent, error)
        return None
    try:
        tokenizer, config = convert(path)
        (partial / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
        (partial / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
        os.replace(partial, folder)
    except OSError as error:
        if not (folder / "tokenizer.json").is_file():  # else another process was faster
            logger.warning("The tokenizer cache %s cannot be written (%s): start-up will be slower.", folder, error)
            return None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def convert(path: Path) -> tuple[Json, Json]:
    """→ (tokenizer.json, tokenizer_config.json). Raises ConfigError for a vocabulary that is not BPE."""
    header = read_header(path, lambda key: key.startswith("tokenizer.") or key == "general.architecture")
    metadata = header.metadata.values
    model = metadata.get("tokenizer.ggml.model")
    if "tokenizer.ggml.tokens" not in metadata:
        raise ConfigError(f"{path} holds no vocabulary: name another tokenizer with `tokenizer`.")
    if model == "gpt2":
        return _byte_level(metadata), _config(metadata)
    if model == "llama":
        return _sentencepiece(metadata), _config(metadata)
    raise ConfigError(
        f"{path} holds a {model!r} vocabulary, but only 'gpt2' and 'llama' ones can be read: "
        "name the model's Hugging Face folder with `tokenizer`."
    )


def _key(path: Path) -> str:
    try:
        stat = path.stat()
        with open(path, "rb") as file:
            head = hashlib.sha256(file.read(_HEAD_BYTES))
    except OSError as error:
        raise ConfigError(f"Cannot read the GGUF file {path}: {error.strerror or error}.") from error
    head.update(f"{_CONVERSION}:{stat.st_size}:{stat.st_mtime_ns}".encode())
    return head.hexdigest()[:32]


def _split(metadata: Json) -> Any:
    name = metadata.get("tokenizer.ggml.pre", "")
    if name not in SPLITS:
        logger.warning("Unknown tokenizer.ggml.pre %r: the default word split is used, encoding may be off.", name)
    if name in ("", "default"):
        logger.warning("The GGUF file names no word split (tokenizer.ggml.pre): encoding may be off.")
    return SPLITS.get(name, SPLITS["default"])


def _token(metadata: Json, name: str) -> str | None:
    """The token that plays the part `name`."""
    tokens = metadata["tokenizer.ggml.tokens"]
    index = metadata.get(f"tokenizer.ggml.{name}_token_id")
    return tokens[index] if index is not None and 0 <= index < len(tokens) else None


def _config(metadata: Json) -> Json:
    ends = [_token(metadata, name) for name in ("eot", "eom")]
    config: Json = {
        "bos_token": _token(metadata, "bos"),
        "eos_token": _token(metadata, "eos"),
        "unk_token": _token(metadata, "unknown"),
        "pad_token": _token(metadata, "padding"),
        # Ours: other tokens that end a turn.
        "octavo_end_tokens": [token for token in ends if token is not None],
    }
    keys = {"default": "tokenizer.chat_template"}
    keys |= {name: f"tokenizer.chat_template.{name}" for name in metadata.get("tokenizer.chat_templates", ())}
    templates = [{"name": name, "template": metadata[key]} for name, key in keys.items() if metadata.get(key)]
    if templates:
        config["chat_template"] = templates
    return {key: value for key, value in config.items() if value is not None}


def _added(metadata: Json, special: set[int]) -> list[Json]:
    """Tokens found in text before anything is cut: control tokens (special), and user-defined ones (plain)."""
    # Phi-3's tokenizer.json swallows the white space behind its control tokens; GGUF has no key for that.
    rstrip = metadata.get("general.architecture") == "phi3"
    return [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": rstrip and kind in special,
            "normalized": False,
            "special": kind in special,
        }
        for index, (token, kind) in enumerate(_typed(metadata))
        if (kind in special or kind == _USER_DEFINED) and token
    ]


def _typed(metadata: Json) -> Iterator[tuple[str, int]]:
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    kinds = metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    return zip(tokens, kinds, strict=True)


def _vocab(tokens: Iterable[str]) -> dict[str, int]:
    """Token → id. The first of equal spellings wins, as its merges do; the others stay reachable by no text."""
    vocab: dict[str, int] = {}
    for index, token in enumerate(tokens):
        # A padded vocabulary may repeat a name; an id must still have one for decoding.
        vocab[token if token not in vocab else f"{token}\x00{index}"] = index
    return vocab


def _ends(metadata: Json, add_bos: bool) -> Json:
    """The post-processor that puts the beginning and end tokens around a text. add_bos: if the file does not say."""
    bos = _token(metadata, "bos") if metadata.get("tokenizer.ggml.add_bos_token", add_bos) else None
    eos = _token(metadata, "eos") if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    first = [{"SpecialToken": {"id": bos, "type_id": 0}}] if bos else []
    last = [{"SpecialToken": {"id": eos, "type_id": 0}}] if eos else []
    ids = {t: metadata[f"tokenizer.ggml.{name}_token_id"] for t, name in ((bos, "bos"), (eos, "eos")) if t}
    text, second = ({"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [*first, text, *last],
        "pair": [*first, text, *last, second],
        "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]} for token, i in ids.items()},
    }


def _document(metadata: Json, special: set[int], model: Json, add_bos: bool, **parts: Any) -> Json:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(metadata, special),
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": _ends(metadata, add_bos),
        "decoder": None,
        **parts,
        "model": {"type": "BPE", "continuing_subword_prefix": None, "end_of_word_suffix": None, **model},
    }


def _byte_level(metadata: Json) -> Json:
    split = _split(metadata)
    vocab = _vocab(metadata["tokenizer.ggml.tokens"])
    model = {
        "unk_token": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": split.whole_words,
        "vocab": vocab,
        "merges": _listed_merges(metadata, vocab),
    }
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return _document(metadata, {_CONTROL}, model, split.add_bos, pre_tokenizer=split.pre_tokenizer(), decoder=decoder)


def _sentencepiece(metadata: Json) -> Json:
    vocab = _vocab(metadata["tokenizer.ggml.tokens"])
    unknown = next((token for token, kind in _typed(metadata) if kind == _UNKNOWN), None)
    merges = _listed_merges(metadata, vocab) or _merges_from_ranks(vocab, _ranks(metadata))
    model = {
        "unk_token": unknown,
        "fuse_unk": True,
        "byte_fallback": any(kind == _BYTE for _, kind in _typed(metadata)),
        "ignore_merges": False,
        "vocab": vocab,
        "merges": merges,
    }
    spaces: list[Json] = [{"type": "Replace", "pattern": {"String": " "}, "content": _WORD_START}]
    text: list[Json] = [
        {"type": "Replace", "pattern": {"String": _WORD_START}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        # Before each stretch of text, so behind every control token too, as llama.cpp does it.
        spaces.insert(0, {"type": "Prepend", "prepend": _WORD_START})
        text.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return _document(
        metadata,
        {_CONTROL, _UNKNOWN},
        model,
        True,
        normalizer={"type": "Sequence", "normalizers": spaces},
        decoder={"type": "Sequence", "decoders": text},
    )


def _listed_merges(metadata: Json, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """The file's merges, without those that the vocabulary has no token for (the backend refuses them)."""
    pairs = (merge.partition(" ") for merge in metadata.get("tokenizer.ggml.merges", ()))
    return [(left, right) for left, _, right in pairs if left in vocab and right in vocab and left + right in vocab]


def _ranks(metadata: Json) -> dict[str, float]:
    """Token → how late it is merged, lower first; only tokens that merging may produce."""
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None:
        raise ConfigError("The GGUF file's 'llama' vocabulary has neither scores nor merges: name another `tokenizer`.")
    # Gemma's pieces are listed in the order of their merges; their scores are not.
    by_place = str(metadata.get("general.architecture", "")).startswith("gemma")
    return {
        token: index if by_place else -scores[index]
        for index, (token, kind) in enumerate(_typed(metadata))
        if kind in (_NORMAL, _UNUSED)
    }


def _merges_from_ranks(vocab: dict[str, int], ranks: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to put a token together from two others, best token first.

    SentencePiece merges whichever neighbours form the best piece. A merge list says the same if each piece is there
    with all its cuts; among the cuts of one piece the order is that of the parts' ids.
    """
    found: list[tuple[float, int, int, int, str, str]] = []
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                found.append((rank, vocab[token], vocab[left], vocab[right], left, right))
    found.sort()
    return [(entry[4], entry[5]) for entry in found]

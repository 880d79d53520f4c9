"""Tokenizers against the libraries that define them: same ids, same text; and start-up without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from octavo.engine.errors import ConfigError, RequestError
from octavo.engine.loader.gguf_header import read_header
from octavo.engine.text import gguf_tokenizer
from octavo.engine.text.byte_tokenizer import ByteTokenizer
from octavo.engine.text.tokenizer import Tokenizer, load_tokenizer

from .conftest import (
    CHATML,
    KINDS,
    TEXTS,
    byte_level_gguf,
    sentencepiece_gguf,
    train_byte_level,
    write_gguf,
)


@pytest.mark.parametrize(
    "split", ["smollm", "gpt-2", "llama-bpe", "qwen2", "tekken", "gpt-4o", "deepseek-v3", "default"]
)
def test_byte_level_gguf_encodes_like_the_tokenizer_it_was_made_from(tmp_path: Path, split: str) -> None:
    original = train_byte_level(split)
    loaded = load_tokenizer(byte_level_gguf(tmp_path / "m.gguf", original, split, ggml_add_bos_token=False))
    for text in [*TEXTS, "".join(TEXTS), "<|im_start|>user\nhi<|im_end|>"]:
        ids = original.encode(text).ids
        assert loaded.encode(text) == ids
        assert loaded.decode(ids, skip_special_tokens=False) == text
    assert loaded.vocab_size == original.get_vocab_size()
    assert (loaded.bos_token_id, loaded.eos_token_ids) == (1, (2,))
    assert loaded.is_special(2)
    assert not loaded.is_special(300)


def test_named_splits_are_those_of_the_tokenizers_library() -> None:
    """smollm and gpt-2 are also known as pre-tokenizers of the library, which the model's own files use."""
    from tokenizers import pre_tokenizers

    from octavo.engine.text.gguf_splits import SPLITS

    known = {
        "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "smollm": pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
    }
    empty = tokenizers.Tokenizer(tokenizers.models.BPE()).to_str()
    for name, theirs in known.items():
        document = {**json.loads(empty), "pre_tokenizer": SPLITS[name].pre_tokenizer()}
        ours = tokenizers.Tokenizer.from_str(json.dumps(document)).pre_tokenizer
        for text in [*TEXTS, "".join(TEXTS)]:
            assert [w for w, _ in ours.pre_tokenize_str(text)] == [w for w, _ in theirs.pre_tokenize_str(text)]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_gguf_encodes_like_sentencepiece(tmp_path: Path, sentencepiece_model: Path, prefix: bool) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model), add_bos=True)
    path = sentencepiece_gguf(tmp_path / "m.gguf", sentencepiece_model, ggml_add_space_prefix=prefix)
    loaded = load_tokenizer(path)
    for text in TEXTS:
        if prefix:
            assert loaded.encode(text) == processor.encode(text)
            assert loaded.decode(processor.encode(text)) == processor.decode(processor.encode(text)) == text
        else:
            assert loaded.decode(loaded.encode(text)) == text
    assert loaded.encode("x")[0] == processor.bos_id()  # files that do not say so want a beginning token
    # A control token parts the text; each part is a text of its own, as in llama.cpp.
    if prefix:
        assert loaded.encode("Hello</s>Hello", False) == [
            *processor.encode("Hello")[1:],
            2,
            *processor.encode("Hello")[1:],
        ]


def test_sentencepiece_merges_by_score_and_gemma_by_place(tmp_path: Path, sentencepiece_model: Path) -> None:
    """Merging follows the scores however the pieces are numbered; in Gemma's files, their numbers."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    size = processor.get_piece_size()
    first = next(i for i in range(size) if not (processor.is_byte(i) or i < 3))
    order = [*range(first), *reversed(range(first, size))]
    pieces = [processor.id_to_piece(i) for i in order]
    scores = [processor.get_score(i) for i in order]
    kinds = [2 if i == 0 else 3 if i < 3 else 6 if i < first else 1 for i in range(size)]
    renumbered = sentencepiece_gguf(
        tmp_path / "r.gguf", sentencepiece_model, ggml_tokens=pieces, ggml_scores=scores, ggml_token_type=kinds
    )
    gemma = sentencepiece_gguf(
        tmp_path / "g.gguf", sentencepiece_model, architecture="gemma2", ggml_scores=[0.0] * size
    )
    for loaded in (load_tokenizer(renumbered), load_tokenizer(gemma)):
        for text in TEXTS:
            ids = loaded.encode(text, add_special_tokens=False)
            assert loaded.convert_ids_to_tokens(ids) == processor.encode(text, out_type=str)


def test_gguf_tokens_added_by_the_user_are_found_and_shown(tmp_path: Path) -> None:
    original = train_byte_level("qwen2")
    tokens = sorted(original.get_vocab(), key=original.get_vocab().__getitem__)
    kinds = [3 if i < 3 else 1 for i in range(len(tokens))] + [4, 3, 5]
    tokens += ["<think>", "<｜begin▁of▁sentence｜>", "[PAD1]"]
    path = byte_level_gguf(
        tmp_path / "m.gguf",
        original,
        "qwen2",
        ggml_tokens=tokens,
        ggml_token_type=kinds,
        ggml_add_bos_token=True,
        ggml_bos_token_id=len(tokens) - 2,
        ggml_eot_token_id=0,
    )
    loaded = load_tokenizer(path)
    ids = loaded.encode("<think>a")
    assert ids == [len(tokens) - 2, len(tokens) - 3, *loaded.encode("a", add_special_tokens=False)]
    assert loaded.decode(ids) == "<think>a"
    assert loaded.decode(ids, skip_special_tokens=False) == "<｜begin▁of▁sentence｜><think>a"
    assert loaded.eos_token_ids == (2, 0)
    assert loaded.vocab_size == len(tokens)


def test_real_smollm2_matches_transformers(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    path = smollm2
    ours = load_tokenizer(path)
    theirs = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    # transformers does not know the rule "smollm" and falls back to GPT-2's; they differ in white space before digits.
    backend = theirs.backend_tokenizer
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    for text in [*TEXTS, "\n".join(TEXTS)]:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == text
    chat = [{"role": "user", "content": "Hi"}]
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=False
    )
    assert "named SmolLM" in ours.apply_chat_template(chat)
    assert (ours.vocab_size, ours.bos_token_id, ours.eos_token_ids) == (49152, 1, (2,))


def test_gguf_conversion_is_kept_and_follows_the_file(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = byte_level_gguf(tmp_path / "m.gguf", train_byte_level("smollm"), "smollm")
    first = load_tokenizer(path)
    conversions: list[Path] = []
    real = gguf_tokenizer.convert

    def counted(file: Path) -> tuple[dict, dict]:
        conversions.append(file)
        return real(file)

    monkeypatch.setattr(gguf_tokenizer, "convert", counted)
    again = load_tokenizer(path)
    assert conversions == []
    assert [again.encode(t) for t in TEXTS] == [first.encode(t) for t in TEXTS]
    assert again.chat_template == CHATML
    byte_level_gguf(path, train_byte_level("smollm", vocab_size=500), "smollm")
    assert load_tokenizer(path).vocab_size == 500
    assert conversions == [path]
    assert not list((cache / "tokenizers").glob(".partial-*"))


def test_gguf_loads_where_nothing_can_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = byte_level_gguf(tmp_path / "m.gguf", train_byte_level("smollm"), "smollm")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "file"))
    loaded = load_tokenizer(path)
    assert loaded.decode(loaded.encode("Hello 🎉")) == "Hello 🎉"


def test_broken_files_are_refused_in_a_sentence(tmp_path: Path) -> None:
    whole = byte_level_gguf(tmp_path / "m.gguf", train_byte_level("smollm"), "smollm").read_bytes()
    damaged = tmp_path / "d.gguf"
    for content in (b"", b"GGUF", b"NOPE" + whole[4:], whole[: len(whole) // 2], whole[:40] + b"\xff" * 64):
        damaged.write_bytes(content)
        with pytest.raises(ConfigError, match="GGUF"):
            load_tokenizer(damaged)
    with pytest.raises(ConfigError, match="'t5' vocabulary"):
        load_tokenizer(write_gguf(tmp_path / "t5.gguf", ggml_model="t5", ggml_tokens=["a"]))
    with pytest.raises(ConfigError, match="no vocabulary"):
        load_tokenizer(write_gguf(tmp_path / "none.gguf", ggml_model="gpt2"))
    with pytest.raises(ConfigError, match="no tokenizer folder"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(tmp_path)


def test_metadata_reader_agrees_with_the_gguf_package(tmp_path: Path) -> None:
    import gguf

    path = byte_level_gguf(tmp_path / "m.gguf", train_byte_level("smollm"), "smollm")
    expected = {k: f.contents() for k, f in gguf.GGUFReader(path).fields.items() if not k.startswith("GGUF.")}
    assert read_header(path).metadata.values == expected
    only = read_header(path, lambda key: key == "tokenizer.ggml.pre").metadata.values
    assert only == {"tokenizer.ggml.pre": "smollm"}


# ---- Hugging Face folders


def _folder(tmp_path: Path, config: dict, **files: str) -> Path:
    train_byte_level("qwen2").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (tmp_path / name.replace("__", ".")).write_text(content)
    return tmp_path


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"add_bos_token": True, "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
        {"add_bos_token": True, "add_eos_token": True, "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
        {"add_bos_token": True, "bos_token": None},
        {"eos_token": "<new-end>", "additional_special_tokens": ["<extra>"]},
        {
            "added_tokens_decoder": {
                "900": {"content": "<tool>", "special": False, "normalized": False},
                "901": {"content": "<hidden>", "special": True, "normalized": False},
            }
        },
    ],
)
def test_folder_settings_do_what_they_do_in_transformers(tmp_path: Path, config: dict) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = _folder(tmp_path, config)
    ours, theirs = load_tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(str(folder))
    for text in [*TEXTS, "a<new-end>b<extra>c<tool>d<hidden>e <|im_end|>f"]:
        for special in (True, False):
            ids = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, add_special_tokens=special) == ids
            assert ours.decode(ids, skip_special_tokens=special) == theirs.decode(ids, skip_special_tokens=special)
    assert ours.vocab_size == len(theirs)
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))


def test_end_tokens_and_templates_come_from_the_files_beside(tmp_path: Path) -> None:
    config = {"eos_token": "<|im_end|>", "chat_template": [{"name": "default", "template": "old"}]}
    extra = {"generation_config__json": '{"eos_token_id": [2, 0]}', "chat_template__jinja": "new"}
    loaded = load_tokenizer(_folder(tmp_path, config, **extra))
    assert loaded.eos_token_ids == (2, 0)
    assert loaded.chat_template == "new"


def test_legacy_special_tokens_map_is_read(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    token = {"content": "<new-end>", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
    folder = _folder(tmp_path, {"eos_token": "<|im_end|>"}, special_tokens_map__json=json.dumps({"eos_token": token}))
    theirs = PreTrainedTokenizerFast.from_pretrained(str(folder))
    assert load_tokenizer(folder).eos_token_ids == (theirs.eos_token_id,)


def test_padding_and_truncation_of_the_file_are_off(tmp_path: Path) -> None:
    backend = train_byte_level("qwen2")
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(load_tokenizer(tmp_path).encode("one two three four five six seven")) > 3
    assert len(load_tokenizer(tmp_path).encode("one")) < 10


def test_folders_without_tokenizer_json_go_through_transformers(tmp_path: Path, sentencepiece_model: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model.read_bytes())
    config = {"tokenizer_class": "LlamaTokenizer", "chat_template": CHATML, "add_bos_token": True, "legacy": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(tmp_path)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model), add_bos=True)
    assert loaded.encode("Hello, world!") == processor.encode("Hello, world!")
    assert loaded.decode(loaded.encode("Größe 🎉")) == "Größe 🎉"
    assert loaded.chat_template == CHATML
    with pytest.raises(ConfigError, match="transformers can load"):
        load_tokenizer(sentencepiece_model.parent / "..")


# ---- what all kinds share


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_keeps_the_contract(kinds: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = kinds[kind]
    text = "Hello world 12"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids
    assert tokenizer.encode_batch([text, "a"], add_special_tokens=False) == [
        ids,
        tokenizer.encode("a", add_special_tokens=False),
    ]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode([*ids, 10**6]) == text  # an id of the padded vocabulary
    assert len(tokenizer.convert_ids_to_tokens(ids)) == len(ids)
    assert tokenizer.convert_ids_to_tokens([10**6]) == [""]
    assert tokenizer.token_bytes(10**6) == b""
    with pytest.raises(RequestError, match="Unicode") as caught:
        tokenizer.encode("bad \ud800 surrogate")
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "bytes"])
def test_token_bytes_make_up_the_text(kinds: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = kinds[kind]
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        data = b"".join(map(tokenizer.token_bytes, ids))
        assert data.decode().removeprefix(" " if kind == "sentencepiece" else "") == text
        whole = [i for i in ids if "�" not in tokenizer.token_text(i)]
        assert all(tokenizer.token_text(i).encode() == tokenizer.token_bytes(i) for i in whole)


def test_byte_tokenizer_knows_its_special_tokens() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("é") == [256, 0xC3, 0xA9]
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    assert ids[:2] == [256, 258]
    assert tokenizer.decode(ids, skip_special_tokens=False) == prompt
    assert tokenizer.decode(ids) == "user\nhi\nassistant\n"
    assert tokenizer.convert_ids_to_tokens([10, 257]) == ["<0x0A>", "<|eos|>"]


def test_start_up_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    byte_level_gguf(tmp_path / "m.gguf", train_byte_level("smollm"), "smollm")
    code = (
        "import sys\n"
        "from octavo.engine.text.tokenizer import load_tokenizer\n"
        "from octavo.engine.text import stream, bad_words, byte_tokenizer\n"
        f"load_tokenizer({str(tmp_path / 'm.gguf')!r}).apply_chat_template([{{'role': 'user', 'content': 'x'}}])\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy', 'ray')))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0

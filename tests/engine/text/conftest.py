"""Small real tokenizers of every kind, trained here in a second, and the text they are tried on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from octavo.engine.text.byte_tokenizer import ByteTokenizer
from octavo.engine.text.gguf_splits import SPLITS
from octavo.engine.text.tokenizer import Tokenizer, load_tokenizer

TEXTS = [
    "Hello, world! It's a test; we've tested, they'll TEST, I'D say.",
    "The year 2024 had 366 days, pi is 3.14159 and 1,000,000 is a million. x1y22z333",
    "Größe, naïve café, Ærøskøbing, señor, Łódź, İstanbul",
    "中文分词很有意思。日本語もテストします。한국어도 시험합니다.",
    "Привет, мир! Γειά σου Κόσμε. שלום עולם. مرحبا بالعالم. नमस्ते दुनिया",
    "🎉 emoji 👩‍👩‍👧‍👦 family 🇩🇪 flag ❤️ heart 🤷🏽‍♀️",
    "def f(x):\n\treturn {'a': [x ** 2 for x in range(10)]}  # comment\n\n\nif __name__ == '__main__':\n    f(1)\n",
    "  leading and   inner    runs\t\tof \n\n \n space   ",
    " ",
    "\n",
    "a",
    '<html><body class="x">&amp;</body></html> https://example.org/?q=1&r=%20#frag',
    "e\u0301 combining, \u200bzero width, \u00a0nbsp, \u3000wide space",
    "ALLCAPS camelCaseWords snake_case kebab-case 12ab34",
    "",
]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OCTAVO_CACHE", str(folder))
        yield folder


def train_byte_level(split: str, vocab_size: int = 700) -> tokenizers.Tokenizer:
    """A byte-level BPE that cuts words as `split` says."""
    backend = tokenizers.Tokenizer(models.BPE())
    steps = [pre_tokenizers.Split(tokenizers.Regex(s), "isolated") for s in SPLITS[split].steps]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        TEXTS * 3,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return backend


def write_gguf(path: Path, **keys: Any) -> Path:
    """A GGUF file with `tokenizer.<key>` metadata and no tensors. Underscored prefix: ggml_tokens → ggml.tokens."""
    writer = gguf.GGUFWriter(path, keys.pop("architecture", "llama"))
    for name, value in keys.items():
        key = "tokenizer." + name.replace("ggml_", "ggml.", 1)
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def byte_level_gguf(path: Path, backend: tokenizers.Tokenizer, split: str, **keys: Any) -> Path:
    document = json.loads(backend.to_str())
    vocab = document["model"]["vocab"]
    tokens = sorted(vocab, key=vocab.__getitem__)
    given = {
        "ggml_model": "gpt2",
        "ggml_pre": split,
        "ggml_tokens": tokens,
        "ggml_token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "ggml_merges": [" ".join(pair) for pair in document["model"]["merges"]],
        "ggml_bos_token_id": 1,
        "ggml_eos_token_id": 2,
        "chat_template": CHATML,
    }
    return write_gguf(path, **{**given, **keys})


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama-like model: BPE, byte fallback, a space put in front, no normalisation."""
    folder = tmp_path_factory.mktemp("spm")
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(text.replace("\n", " ") for text in TEXTS * 3), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=640,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def sentencepiece_gguf(path: Path, model: Path, **keys: Any) -> Path:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    kinds = []
    for token_id in range(processor.get_piece_size()):
        kind = 6 if processor.is_byte(token_id) else 3 if processor.is_control(token_id) else 1
        kinds.append(2 if processor.is_unknown(token_id) else kind)
    given = {
        "ggml_model": "llama",
        "ggml_tokens": [processor.id_to_piece(i) for i in range(processor.get_piece_size())],
        "ggml_scores": [processor.get_score(i) for i in range(processor.get_piece_size())],
        "ggml_token_type": kinds,
        "ggml_bos_token_id": processor.bos_id(),
        "ggml_eos_token_id": processor.eos_id(),
        "ggml_unknown_token_id": processor.unk_id(),
    }
    return write_gguf(path, **{**given, **keys})


def _byte_level_folder(folder: Path) -> Path:
    backend = train_byte_level("qwen2")
    backend.add_tokens([AddedToken("<think>", normalized=False), AddedToken("größe!", normalized=False)])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|im_end|>", "bos_token": None, "chat_template": CHATML})
    )
    return folder


def _metaspace_folder(folder: Path) -> Path:
    """Unigram with Metaspace, as T5-like models have it: other rules for the leading space."""
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(
        TEXTS, trainers.UnigramTrainer(vocab_size=400, special_tokens=["<unk>", "</s>"], unk_token="<unk>")
    )
    backend.save(str(folder / "tokenizer.json"))
    return folder


def _wordpiece_folder(folder: Path) -> Path:
    """WordPiece's decoder is not a concatenation of bytes: it goes through the window."""
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    )
    backend.save(str(folder / "tokenizer.json"))
    return folder


KINDS = ("byte-level", "sentencepiece", "metaspace", "wordpiece", "slow", "bytes")


@pytest.fixture(scope="session")
def kinds(tmp_path_factory: pytest.TempPathFactory, sentencepiece_model: Path) -> dict[str, Tokenizer]:
    """One tokenizer of each of KINDS."""
    from transformers import ByT5Tokenizer

    from octavo.engine.text.chat import ChatTemplates
    from octavo.engine.text.slow_tokenizer import SlowTokenizer

    new = tmp_path_factory.mktemp
    return {
        "byte-level": load_tokenizer(_byte_level_folder(new("bl"))),
        "sentencepiece": load_tokenizer(sentencepiece_gguf(new("sp") / "tiny.gguf", sentencepiece_model)),
        "metaspace": load_tokenizer(_metaspace_folder(new("ms"))),
        "wordpiece": load_tokenizer(_wordpiece_folder(new("wp"))),
        "slow": SlowTokenizer(ByT5Tokenizer(), ChatTemplates()),
        "bytes": ByteTokenizer(),
    }

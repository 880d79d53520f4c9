"""A random model with a small tokenizer of its own, whose draws say nothing: what has a form has it from its masks."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB = 512
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB + 8,  # more than the tokenizer has, as many checkpoints
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": [1, 2],
}
TEXTS = [
    json.dumps({"name": "value", "list": [1, 2, 3], "nested": {"true": True, "null": None}}, indent=i)
    for i in (None, 1, 2)
]


def make_model(folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps(MODEL))
    save_file({"none": torch.zeros(1)}, folder / "model.safetensors")  # not read: the weights are dummies
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<|turn|>", "</think>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = [" ".join(f"{a}{b}ing {b}{a}er" for a in ("walk", "read", "th") for b in ("re", "in", "st"))]
    backend.train_from_iterator(
        [*TEXTS, *words] * 20, trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet)
    )
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": special[0], "eos_token": special[1]}))
    return folder


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("random"))


@pytest.fixture(autouse=True, scope="module")
def _one_thread_each():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

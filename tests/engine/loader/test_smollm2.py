"""The real default model, from the file that `octavo serve` takes where the hub cannot be reached."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import transformers

from octavo.engine.loader.checkpoint import open_checkpoint
from octavo.engine.loader.gguf import GGUFCheckpoint
from octavo.engine.loader.source import ModelSource

PROMPT = [22007, 6463, 314]  # "Gravity is"
CONTINUATION = [253, 4959, 1909, 281, 6944, 338, 6601, 260, 26589, 282, 42548, 2952]
# " a fundamental concept in physics that describes the curvature of spacetime"


@pytest.fixture(scope="module")
def checkpoint(smollm2: Path) -> GGUFCheckpoint:
    return GGUFCheckpoint(smollm2)


def test_opening_takes_no_time(checkpoint: GGUFCheckpoint, smollm2: Path) -> None:
    started = time.process_time()
    open_checkpoint(ModelSource("gguf", smollm2, "smollm2", "smollm2"))
    assert time.process_time() - started < 0.5


def test_config(checkpoint: GGUFCheckpoint) -> None:
    config = checkpoint.config
    assert config.architectures == ["LlamaForCausalLM"]
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (49152, 576, 30)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (9, 3, 64)
    assert config.rope_parameters == {"rope_theta": 100_000.0, "rope_type": "default"}
    assert config.tie_word_embeddings
    assert checkpoint.eos_token_ids == (2,)


def test_speaks_english(checkpoint: GGUFCheckpoint) -> None:
    model = transformers.LlamaForCausalLM(checkpoint.config).eval()
    expected = model.state_dict()
    tensors = dict(checkpoint.float_tensors())
    assert checkpoint.num_tensors == len(tensors) == 272
    assert set(expected) - set(tensors) == {"lm_head.weight"}
    assert {name: tensor.shape for name, tensor in tensors.items()}.items() <= {
        name: tensor.shape for name, tensor in expected.items()
    }.items()
    model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    with torch.inference_mode():
        found = model.generate(torch.tensor([PROMPT]), max_new_tokens=len(CONTINUATION), do_sample=False)
    assert found[0].tolist() == PROMPT + CONTINUATION

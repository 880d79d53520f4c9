"""Memory while a rank loads: its share of the model and little more, whatever the checkpoint's size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from octavo.engine.parallel.layout import Layout

WIDTH, INNER, LAYERS, VOCAB = 768, 2304, 13, 4096
GOAL = 1.3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 103 million parameters: 205 MB in bfloat16."""
    folder = tmp_path_factory.mktemp("large")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    numbers = torch.randn(VOCAB * WIDTH).to(torch.bfloat16)

    def random(*shape: int) -> torch.Tensor:
        return numbers[: torch.Size(shape).numel()].view(shape).clone()

    tensors = {"model.embed_tokens.weight": random(VOCAB, WIDTH), "model.norm.weight": random(WIDTH)}
    for layer in (f"model.layers.{i}" for i in range(LAYERS)):
        for name in "qkvo":
            tensors[f"{layer}.self_attn.{name}_proj.weight"] = random(WIDTH, WIDTH)
        for name in ("gate", "up"):
            tensors[f"{layer}.mlp.{name}_proj.weight"] = random(INNER, WIDTH)
        tensors[f"{layer}.mlp.down_proj.weight"] = random(WIDTH, INNER)
        for name in ("input", "post_attention"):
            tensors[f"{layer}.{name}_layernorm.weight"] = random(WIDTH)
    save_file(tensors, folder / "model.safetensors")
    assert sum(tensor.nbytes for tensor in tensors.values()) > 200e6
    return folder


@pytest.mark.parametrize(("pp", "rank", "quantization"), [(1, 1, "none"), (2, 0, "int8")])
def test_a_rank_needs_its_share(checkpoint: Path, pp: int, rank: int, quantization: str) -> None:
    """Of two tensor-parallel ranks, in one stage or two."""
    script = Path(__file__).with_name("load_share.py")
    arguments = [str(value) for value in (checkpoint, 2, pp, rank, quantization)]
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=120, check=True)
    finished, peak = map(int, done.stdout.split())
    layers = len(Layout(2, pp).layers(LAYERS, 0))
    weights = (VOCAB * WIDTH + layers * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER)) // 2
    share = 2 * weights if quantization == "none" else weights * (1 + 2 / 64)  # a float16 scale for 64 inputs
    print(f"{quantization}: share {share / 1e6:.0f} MB, finished {finished / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB")
    assert 0.9 * share < finished < 1.1 * share
    assert peak <= GOAL * share

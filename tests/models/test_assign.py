"""Loading: every parameter filled, every tensor used or ignored, and one sentence for whatever is wrong."""

import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from octavo.engine.errors import ConfigError
from octavo.engine.layers.linear_method import Unquantized
from octavo.engine.layers.weight import Layer, Weight
from octavo.engine.loader.assign import load_weights
from octavo.engine.loader.dummy import init_dummy
from octavo.engine.models.registry import build_model

sys.path.insert(0, str(Path(__file__).parent))
import tiny
from paged import PagedModel, context

PROMPTS = tiny.prompts([6, 11])


def fresh(name):
    return build_model(tiny.model(name).config, context())


def state(name):
    return dict(tiny.model(name).state_dict())


def greedy(model):
    return PagedModel(model, PROMPTS).greedy(4)


def test_order_prefix_and_extras_do_not_matter():
    want = tiny.reference_greedy(tiny.model("llama"), PROMPTS, 4)
    tensors = {name.removeprefix("model."): tensor for name, tensor in reversed(state("llama").items())}
    tensors["lm_head.weight"] = torch.zeros(tiny.VOCAB, 32)  # tied: the embedding counts
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    model = fresh("llama")
    load_weights(model, tensors.items())
    assert greedy(model) == want


@pytest.mark.parametrize(("name", "prefix"), [("gpt2", "transformer."), ("opt", "model.")])
def test_shorter_names_of_older_checkpoints(name, prefix):
    tensors = {key.removeprefix(prefix): tensor for key, tensor in state(name).items() if key != "lm_head.weight"}
    tensors |= {"h.0.attn.bias": torch.ones(1), "h.0.attn.masked_bias": torch.ones(1)} if name == "gpt2" else {}
    model = fresh(name)
    load_weights(model, tensors.items())
    assert greedy(model) == tiny.reference_greedy(tiny.model(name), PROMPTS, 4)


def test_bytes_are_reported_and_casts_made():
    tensors = {name: tensor.bfloat16() for name, tensor in state("llama").items()}
    seen = []
    model = fresh("llama")
    load_weights(model, tensors.items(), seen.append)
    assert sum(seen) == sum(tensor.nbytes for tensor in tensors.values())
    assert model.embed_tokens.weight.dtype == torch.float32
    assert torch.equal(model.embed_tokens.weight, tensors["model.embed_tokens.weight"].float())


def test_gemma_norms_are_folded_in_float32():
    tensors = state("gemma2")
    model = build_model(tiny.model("gemma2").config, replace(context(), dtype=torch.bfloat16))
    load_weights(model, tensors.items())
    assert model.norm.weight.dtype == torch.float32
    assert torch.equal(model.norm.weight, tensors["model.norm.weight"] + 1)
    assert model.layers[0].mlp.down_proj.weight.dtype == torch.bfloat16


def test_lacking_tensor():
    tensors = state("qwen2")
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    with pytest.raises(ConfigError, match=r"lacks the weights of layers.1.self_attn.qkv_proj.bias \(k\):"):
        load_weights(fresh("qwen2"), tensors.items())


@pytest.mark.parametrize(
    "extra",
    [
        "model.layers.3.mlp.down_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.mlp.down_proj.weight_scale",
        "model.layers.0.self_attn.attention",
        "visual.patch.weight",
        "weight",
    ],
)
def test_unexpected_tensor(extra):
    with pytest.raises(ConfigError, match=f"holds '{extra}', which"):
        load_weights(fresh("llama"), (state("llama") | {extra: torch.zeros(2)}).items())


def test_wrong_shape():
    tensors = state("llama") | {"model.layers.2.self_attn.v_proj.weight": torch.zeros(15, 32)}
    with pytest.raises(
        ConfigError, match=r"'model.layers.2.self_attn.v_proj.weight' has shape \(15, 32\), .*\(16, 32\)"
    ):
        load_weights(fresh("llama"), tensors.items())


def test_twice():
    tensors = [*state("phi3").items(), ("model.norm.weight", torch.zeros(32))]
    with pytest.raises(ConfigError, match=r"'model\.norm\.weight' twice"):
        load_weights(fresh("phi3"), tensors)


def test_dummy_weights_follow_the_seed():
    models = [fresh("gemma3") for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        init_dummy(model, seed)
    a, b, c = (PagedModel(model, PROMPTS) for model in models)
    for paged in (a, b, c):
        paged.step([(0, 6), (1, 11)])
    first, same, other = (torch.stack(paged.logits[1]) for paged in (a, b, c))
    assert first.isfinite().all()
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


class StoredInHalf:
    """A number format of its own: weights are kept in bfloat16 under another name, and computed with in float32."""

    cut_unit = 1

    def create(self, layer, shape, rule):
        layer.stored = Weight(shape, rule, torch.bfloat16, layer.device)

    def expects(self, layer):
        return {"weight": layer.stored}

    def load(self, layer, name, part, tensor):
        assert name == "weight"
        layer.stored.fill(part, tensor)

    def finish(self, layer):
        assert layer.stored.any(), "called before the weight was there"

    def rounding(self, layer):
        return None

    def project(self, x, table):
        return torch.nn.functional.linear(x, table)

    def apply(self, layer, x, bias):
        return torch.nn.functional.linear(x, layer.stored.float(), bias)


@pytest.mark.parametrize("name", ["llama-bias", "phi3", "gpt2"])
def test_a_linear_method_replaces_every_linear_weight(name):
    """Model files know nothing of it: the rounded checkpoint in float32 gives the same logits."""
    tensors = state(name)
    linear = {key for key, tensor in tensors.items() if "layers" in key or ".h." in key if tensor.dim() == 2}
    rounded = {key: tensor.bfloat16().float() if key in linear else tensor for key, tensor in tensors.items()}
    logits = []
    for method, given in ((StoredInHalf(), tensors), (Unquantized(), rounded)):
        model = build_model(tiny.model(name).config, replace(context(), linear_method=method))
        load_weights(model, given.items())
        paged = PagedModel(model, PROMPTS)
        paged.step([(0, 6), (1, 11)])
        logits.append(torch.stack(paged.logits[1]))
    assert torch.equal(*logits)


@pytest.mark.parametrize("workers", [1, 3])
def test_layers_are_finished_by_threads(workers):
    """All of them when loading ends; an error of one ends it."""
    want = tiny.reference_greedy(tiny.model("llama"), PROMPTS, 4)
    model = fresh("llama")
    finished = []
    for path, layer in model.named_modules():
        if isinstance(layer, Layer):
            layer.finish = lambda path=path: finished.append(path)
    load_weights(model, state("llama").items(), workers=workers)
    assert greedy(model) == want
    assert sorted(finished) == sorted(path for path, layer in model.named_modules() if hasattr(layer, "weight"))
    assert not any(thread.name.startswith("finish-layers") for thread in threading.enumerate())

    def fail():
        raise MemoryError("no more")

    model = fresh("llama")
    model.layers[1].mlp.down_proj.finish = fail
    with pytest.raises(MemoryError, match="no more"):
        load_weights(model, state("llama").items(), workers=workers)

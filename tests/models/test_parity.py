"""Every family against transformers: equal logits and equal greedy tokens, packed, chunked and paged."""

import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from octavo.engine.loader.assign import load_weights
from octavo.engine.models.registry import build_model, max_model_len

sys.path.insert(0, str(Path(__file__).parent))
import tiny
from paged import PagedModel, context, ours

NEW = 10


@cache
def reference(name):
    """(transformers model, its greedy tokens, its logits [len, V] over prompt and all but the last of them)."""
    model = tiny.model(name)
    prompts = tiny.prompts()
    tokens = tiny.reference_greedy(model, prompts, NEW)
    return model, tokens, [whole_logits(model, p + t[:-1]) for p, t in zip(prompts, tokens, strict=True)]


@torch.inference_mode()
def whole_logits(model, ids):
    return model(torch.tensor([ids])).logits[0].float()


def assert_logits(paged, want):
    for got, expected in zip(paged.logits, want, strict=True):
        torch.testing.assert_close(torch.stack(got), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_family_matches_transformers(name, chunk):
    model, tokens, logits = reference(name)
    paged = PagedModel(ours(model), tiny.prompts())
    assert paged.greedy(NEW, chunk) == tokens
    assert_logits(paged, logits)


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_references_are_worth_comparing(name):
    """Greedy tokens vary, so that equality says something."""
    _, tokens, _ = reference(name)
    assert len({t for sequence in tokens for t in sequence}) > NEW


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "gemma3", "opt-350m"])
def test_through_saved_checkpoint(name, tmp_path):
    folder = tiny.make(name, tmp_path)
    model = build_model(AutoConfig.from_pretrained(folder), context())
    load_weights(model, load_file(folder / "model.safetensors").items())
    assert PagedModel(model, tiny.prompts()).greedy(NEW) == reference(name)[1]
    assert tiny.reference_greedy(folder, tiny.prompts(), NEW) == reference(name)[1]


def test_dynamic_ntk_is_fixed_to_the_length_served():
    """At the served length transformers scales alike; up to the trained length neither scales."""
    model = tiny.model("llama-dynamic")
    (ids,) = tiny.prompts([48])
    paged = PagedModel(ours(model, context(max_model_len=48)), [ids])
    paged.step([(0, 48)])
    assert_logits(paged, [whole_logits(tiny.model("llama-dynamic"), ids)])

    short = tiny.prompts([9, 20])
    paged = PagedModel(ours(model, context(max_model_len=32)), short)
    assert paged.greedy(NEW) == tiny.reference_greedy(tiny.model("llama-dynamic"), short, NEW)
    assert max_model_len(model.config) == 64


@pytest.mark.parametrize(("max_len", "lengths"), [(None, (17, 40)), (16, (3, 6))])
def test_longrope_follows_the_length_served(max_len, lengths):
    """Long factors when more than the original length (16) is served, short ones otherwise."""
    model, prompts = tiny.model("phi3-longrope"), tiny.prompts(lengths)
    want = tiny.reference_greedy(model, prompts, NEW)
    paged = PagedModel(ours(model, context(max_model_len=max_len)), prompts)
    assert paged.greedy(NEW) == want
    assert_logits(paged, [whole_logits(model, p + t[:-1]) for p, t in zip(prompts, want, strict=True)])

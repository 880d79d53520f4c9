"""A model cut over ranks and stages gives the logits and the greedy tokens of the whole one.

Ranks are threads; what travels between them goes through real gloo.
"""

import sys
import threading
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from octavo.engine.errors import ConfigError
from octavo.engine.layers.heads import share_heads
from octavo.engine.loader.assign import load_weights
from octavo.engine.loader.dummy import init_dummy
from octavo.engine.models.fits import check_layout
from octavo.engine.models.registry import build_model
from octavo.engine.parallel.layout import Layout
from octavo.engine.quant.methods import choose_methods

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("models", "engine/parallel"))
import tiny
from paged import PagedModel, context, ours
from ranks import on_ranks, unconnected

NEW = 8
LAYOUTS = {
    "tp2": Layout(tp=2),
    "tp3": Layout(tp=3),  # uneven everything: 4 query heads, 1, 2 or 4 KV heads, 48 channels, 192 tokens
    "tp4": Layout(tp=4),  # KV heads are copied
    "pp2": Layout(pp=2),  # 2 + 1 layers
    "pp3": Layout(pp=3),
    "tp2 pp2": Layout(tp=2, pp=2),
    "tp3 pp2": Layout(tp=3, pp=2),
}
NAMES = (
    *("llama", "llama-bias", "llama-one-kv-head", "mistral", "qwen2", "qwen3-window", "gemma2", "gemma3"),
    *("phi3", "phi3-partial", "gpt2", "gpt2-scales", "opt", "opt-350m", "opt-plain"),
)


class Stage:
    """A rank's part as if it were the whole model: takes ids, gives the last stage's logits on every rank."""

    def __init__(self, model, mesh):
        self.model, self.mesh = model, mesh

    def __call__(self, ids, positions, kv, batch):
        x = ids
        if not self.mesh.pp.is_first:
            x = torch.empty(len(ids), self.model.width)
            self.mesh.pp.recv(x, self.mesh.pp.rank - 1)
        hidden = self.model(x, positions, kv, batch)
        if not self.mesh.pp.is_last:
            self.mesh.pp.send(hidden, self.mesh.pp.rank + 1)
        return hidden

    def logits(self, hidden):
        if self.mesh.pp.is_last:
            return self.mesh.pp.all_reduce(self.model.logits(hidden))
        return self.mesh.pp.all_reduce(torch.zeros(len(hidden), self.model.vocab_size))

    def kv_specs(self):
        return self.model.kv_specs()


@cache
def reference(name):
    model = tiny.model(name)
    return model, run(ours(model))


def run(model, prompts=None):
    """Greedy tokens and the logits they came from: mixed steps of chunks and decodes."""
    paged = PagedModel(model, prompts or tiny.prompts())
    tokens = paged.greedy(NEW, chunk=9)
    return tokens, torch.cat([torch.stack(rows) for rows in paged.logits])


def run_cut(layout, make, prompts=None):
    """make(ctx of a rank) → its model. What `run` gives, of every rank."""
    lock = threading.Lock()  # transformers' state dicts and torch's generators are shared by the threads

    def work(mesh):
        with lock:
            model = make(context(mesh=mesh))
        return run(Stage(model, mesh), prompts)

    return on_ranks(layout, work)


def assert_all_agree(results, want):
    for tokens, logits in results:
        assert tokens == want[0]
        torch.testing.assert_close(logits, want[1], atol=1e-4, rtol=1e-4)
        assert torch.equal(logits, results[0][1]), "ranks differ"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_ranks_agree_with_the_whole_model(name, layout):
    model, want = reference(name)
    assert_all_agree(run_cut(LAYOUTS[layout], lambda ctx: ours(model, ctx)), want)


@pytest.mark.parametrize("layout", ["pp2", "pp3"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt-350m"])
@pytest.mark.parametrize("kernels", ["ref", "cpu"])
def test_stages_compute_bit_for_bit_what_one_does(name, layout, kernels):
    """In bfloat16 too, where a sum that was rounded once more would show."""
    model = tiny.model(name)

    def forward(ctx):
        return ours(model, replace(ctx, dtype=torch.bfloat16))

    def work(mesh):
        stage = forward(context(mesh=mesh, kernels=kernels))
        paged = PagedModel(HalfStage(stage, mesh), tiny.prompts())
        paged.step([(0, 5), (1, 23), (2, 1)])
        return [torch.stack(paged.logits[i]) for i in range(3)]

    want = PagedModel(forward(context(kernels=kernels)), tiny.prompts())
    want.step([(0, 5), (1, 23), (2, 1)])
    for got in on_ranks(LAYOUTS[layout], work):
        assert all(torch.equal(got[i], torch.stack(want.logits[i])) for i in range(3))


class HalfStage(Stage):
    def __call__(self, ids, positions, kv, batch):
        x = ids
        if not self.mesh.pp.is_first:
            x = torch.empty(len(ids), self.model.width, dtype=torch.bfloat16)
            self.mesh.pp.recv(x, self.mesh.pp.rank - 1)
        hidden = self.model(x, positions, kv, batch)
        if not self.mesh.pp.is_last:
            self.mesh.pp.send(hidden, self.mesh.pp.rank + 1)
        return hidden


@pytest.mark.parametrize(("name", "heads", "kv", "size"), [("llama", 6, 2, 3), ("llama", 9, 3, 2), ("qwen3", 8, 4, 3)])
def test_uneven_heads(name, heads, kv, size):
    """A sixth of the heads here, a third there: SmolLM2's 9 over 3 among two ranks become 6 and 3."""
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": 8, "intermediate_size": 56}
    model = tiny.model(name, **sizes, hidden_size=8 * heads)
    results = run_cut(Layout(tp=size), lambda ctx: ours(model, ctx))
    assert_all_agree(results, run(ours(model)))


@pytest.mark.parametrize("layout", ["tp2", "tp3", "tp2 pp2"])
@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_quantized_while_loading(name, kind, layout):
    """Heads and channels of whole groups of 64, as real models have them: ranks have the very numbers of a single one.

    Activations of int8 and int4 are rounded to 8 bits: where the order of a sum moves one across an edge, it moves by a
    whole step, and what follows differs by that little.
    """
    sizes = {"gpt2": {"n_embd": 256}}.get(name, {"hidden_size": 128, "head_dim": 64, "intermediate_size": 384})
    model = tiny.model(name, **sizes)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() == 2 and (".layers." in path or ".h." in path):
                parameter.mul_(3.2 / max(parameter.shape) ** 0.5)

    def make(ctx):
        methods = choose_methods(kind, True, None, ctx.ops)
        return ours(model, replace(ctx, linear_method=methods.linear, head_method=methods.head))

    want = run(make(context()))
    results = run_cut(LAYOUTS[layout], make)
    if kind == "fp8":
        assert_all_agree(results, want)
    for tokens, logits in results:
        assert tokens == want[0]
        assert (logits - want[1]).square().mean() < 1e-4 * want[1].square().mean()  # found: at most 3e-6


def test_vocabulary_and_widths_that_do_not_divide():
    config = tiny.config("llama-bias")
    config.vocab_size, config.intermediate_size, config.architectures = 191, 50, ["LlamaForCausalLM"]
    prompts = [[token % 191 for token in prompt] for prompt in tiny.prompts()]

    def make(ctx):
        model = build_model(config, ctx)
        init_dummy(model, seed=3)
        return model

    want = run(make(context()), prompts)
    assert want[1].shape[1] == 191
    assert_all_agree(run_cut(Layout(tp=4), make, prompts), want)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt-350m"])
def test_dummy_weights_do_not_depend_on_the_mesh(name):
    config = tiny.model(name).config

    def weights(ctx):
        model = build_model(config, ctx)
        init_dummy(model, seed=5)
        return dict(model.named_parameters())

    whole = weights(context())
    seen = set()
    layout = Layout(tp=2, pp=2)
    for rank in range(layout.size):
        for path, mine in weights(context(mesh=unconnected(layout, rank))).items():
            seen.add(path)
            tensor = whole[path]
            for axis in range(tensor.dim()):
                if mine.shape[axis] != tensor.shape[axis]:
                    parts = {p.start: tensor.narrow(axis, *at) for p, at in places(mine.rule, tensor.rule)}
                    tensor = torch.cat([part for _, part in sorted(parts.items())], axis)
            assert torch.equal(mine, tensor), path
    assert seen == set(whole)


def places(mine, whole):
    """(part of the rank, (start, size) of it in the whole model's parameter)."""
    starts = {part.name: part.start for part in whole.parts}
    return [(part, (starts[part.name] + part.source, part.size)) for part in mine.parts]


def test_stages_hold_their_layers_alone():
    config = tiny.model("llama").config
    first, last = (build_model(config, context(mesh=unconnected(Layout(pp=2), stage))) for stage in range(2))
    names = [
        {path.split(".self")[0].split(".mlp")[0] for path, _ in model.named_parameters()} for model in (first, last)
    ]
    assert {"embed_tokens.weight", "layers.0", "layers.1"} <= names[0]
    assert not {"norm.weight", "layers.2"} & names[0]
    assert {"embed_tokens.weight", "norm.weight", "layers.2"} <= names[1]  # tied
    assert not {"layers.0", "layers.1"} & names[1]
    assert [len(model.kv_specs()) for model in (first, last)] == [2, 1]
    assert [layer.self_attn.attention.index for layer in last.layers.values()] == [0]


@pytest.mark.parametrize("stage", range(3))
def test_every_stage_checks_its_tensors(stage):
    """A tensor of another stage is not read and not missed; one that nobody knows is an error on every stage."""
    reference = tiny.model("llama-bias")
    config, state = reference.config, reference.state_dict()

    def fresh():
        return build_model(config, context(mesh=unconnected(Layout(pp=3), stage)))

    others = [name for name in state if ".layers." in name and f".layers.{stage}." not in name]
    load_weights(fresh(), ((name, Unread() if name in others else tensor) for name, tensor in state.items()))
    for unknown in ("model.layers.3.mlp.down_proj.weight", "model.layers.0.mlp.down_proj.scale", "visual.weight"):
        with pytest.raises(ConfigError, match=f"holds '{unknown}', which"):
            load_weights(fresh(), (state | {unknown: torch.zeros(2)}).items())
    lacking = f"model.layers.{stage}.mlp.up_proj.bias"
    with pytest.raises(ConfigError, match=rf"lacks the weights of layers.{stage}.mlp.gate_up_proj.bias \(up\)"):
        load_weights(fresh(), [(name, tensor) for name, tensor in state.items() if name != lacking])


class Unread:
    nbytes = 0


def test_heads_follow_their_kv_heads():
    def found(*counts):
        return [(share.query, share.kv) for share in share_heads(*counts)]

    assert found(8, 4, 2) == [(range(4), range(2)), (range(4, 8), range(2, 4))]
    assert found(9, 3, 2) == [(range(6), range(2)), (range(6, 9), range(2, 3))]
    assert found(8, 4, 3) == [(range(4), range(2)), (range(4, 6), range(2, 3)), (range(6, 8), range(3, 4))]
    assert found(6, 2, 3) == [(range(2), range(1)), (range(2, 3), range(1)), (range(3, 6), range(1, 2))]
    assert found(8, 1, 3) == [(range(3), range(1)), (range(3, 6), range(1)), (range(6, 8), range(1))]
    assert found(4, 2, 4) == [(range(i, i + 1), range(i // 2, i // 2 + 1)) for i in range(4)]
    for heads, kv in ((12, 1), (12, 2), (12, 4), (12, 12), (9, 3)):
        for ranks in range(1, heads + 1):
            shares = share_heads(heads, kv, ranks)
            assert [head for share in shares for head in share.query] == list(range(heads))
            for share in shares:
                assert share.query
                assert len(share.query) % len(share.kv) == 0
                local = len(share.query) // len(share.kv)
                reads = [share.kv[i // local] for i in range(len(share.query))]
                assert reads == [head // (heads // kv) for head in share.query]


def test_impossible_layouts_are_refused_before_anything_is_built():
    config = tiny.model("llama").config
    with pytest.raises(
        ConfigError, match="tensor_parallel_size is 5, but the model has 4 attention heads: set it to at"
    ):
        check_layout(config, Layout(tp=5))
    with pytest.raises(
        ConfigError, match="pipeline_parallel_size is 4, but the model has 3 layers: set it to at most 3"
    ):
        build_model(config, context(mesh=unconnected(Layout(pp=4), 0)))
    for name in NAMES:
        check_layout(tiny.model(name).config, Layout(tp=4, pp=3))
    with pytest.raises(ConfigError, match="no collective is connected"):
        run(ours(tiny.model("llama"), context(mesh=unconnected(Layout(tp=2), 0))))

"""Embeddings and classes through the whole engine, against transformers: every family, and every way in which
scheduling can cut a prompt up, interrupt it or put it beside others.

The checkpoints are tests/models/tiny_pooling.py's.
"""

import importlib.util
import json
import shutil
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from launchers import Threads

from octavo.engine.build import Phases, assemble, build_engine
from octavo.engine.config import EngineConfig
from octavo.engine.core.engine import EngineCore
from octavo.engine.errors import ConfigError, RequestError
from octavo.engine.parallel.layout import Layout
from octavo.engine.params import SamplingParams
from octavo.engine.pooling.info import PoolingInfo
from octavo.engine.pooling.params import PoolingParams
from octavo.engine.pooling.prompts import pooling_request
from octavo.engine.process.ranks import Deadlines, Ranks
from octavo.engine.types import Request

_spec = importlib.util.spec_from_file_location("tiny_pooling", Path(__file__).parents[1] / "models" / "tiny_pooling.py")
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

PROMPTS = tiny.prompts()
OPTIONS = {"dtype": "float32", "block_size": 8, "max_num_seqs": 8, "num_gpu_blocks_override": 200}
WAYS = ("last", "mean", "cls")
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return lambda name: tiny.make(name, root)


@cache
def reference(name):
    return tiny.model(name)


@cache
def states(name):
    return [tiny.hidden_states(reference(name), prompt) for prompt in PROMPTS]


def start(path: Path, **options: object) -> EngineCore:
    return build_engine(EngineConfig(model=str(path), **OPTIONS | options)).core


def run(core: EngineCore, requests: list[Request]) -> dict[str, list]:
    """Per request: its pooled values, or its tokens and their log probabilities."""
    found: dict[str, list] = {}
    for request in requests:
        core.add(request)
        found[request.request_id] = []
    while core.has_work:
        for delta in core.step():
            assert delta.error is None, delta.error
            if delta.pooled is not None:
                assert (delta.token_ids, delta.finish_reason, found[delta.request_id]) == ((), "stop", [])
                found[delta.request_id] = np.frombuffer(delta.pooled, "<f4")
            else:
                found[delta.request_id] += [*delta.token_ids, *(entry.logprobs for entry in delta.logprobs)]
        core.scheduler.pool.check()
    assert core.scheduler.pool.num_held == 0
    return found


def requests(core: EngineCore, prompts=PROMPTS, tag: str = "p", **params: object) -> list[Request]:
    wanted = core.scheduler.limits.pooling.resolve(PoolingParams(**params))
    return [pooling_request(f"{tag}{i}", [tuple(prompt)], wanted) for i, prompt in enumerate(prompts)]


def pool(core: EngineCore, prompts=PROMPTS, tag: str = "p", **params: object) -> list[np.ndarray]:
    return list(run(core, requests(core, prompts, tag, **params)).values())


def expect(found: list[np.ndarray], wanted: list[torch.Tensor], tolerance: float = 2e-5) -> None:
    assert len(found) == len(wanted)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(torch.from_numpy(got.copy()), want.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", [n for n in tiny.CASES if n not in tiny.CLASSIFIERS])
def test_embeddings_equal_transformers(folder, name):
    core = start(folder(name))
    try:
        for way in WAYS:
            wanted = [tiny.pooled(each, way) for each in states(name)]
            expect(pool(core, tag=way, pooling_type=way), wanted)
        raw = [tiny.pooled(each, "mean", normalize=False) for each in states(name)]
        expect(pool(core, tag="raw", pooling_type="mean", normalize=False), raw)
    finally:
        core.close()


@pytest.mark.parametrize("name", tiny.CLASSIFIERS)
def test_classes_equal_transformers(folder, name):
    core, model = start(folder(name)), reference(name)
    try:
        wanted = [tiny.logits(model, prompt) for prompt in PROMPTS]
        assert torch.stack(wanted).std(dim=0).max() > 0.1, "equality says nothing"
        expect(pool(core, task="classify", use_activation=False), wanted)
        activation = torch.sigmoid if model.config.num_labels == 1 else lambda x: x.softmax(-1)
        expect(pool(core, tag="q", task="classify"), [activation(each) for each in wanted])
        assert core.scheduler.limits.pooling.labels == tuple(f"LABEL_{i}" for i in range(model.config.num_labels))
        with pytest.raises(RequestError, match="no embeddings"):
            requests(core)
    finally:
        core.close()


@pytest.mark.parametrize("name", ["bert-cross", "bert-classes"])
def test_the_second_text_of_a_pair_is_marked_by_its_tokens(folder, name):
    core = start(folder(name))
    try:
        seconds = [max(1, len(prompt) // 2) for prompt in PROMPTS]
        pairs = [
            [*prompt[:second], *(token + tiny.VOCAB for token in prompt[second:])]
            for prompt, second in zip(PROMPTS, seconds, strict=True)
        ]
        model = reference(name)
        wanted = [tiny.logits(model, prompt, second) for prompt, second in zip(PROMPTS, seconds, strict=True)]
        expect(pool(core, pairs, task="classify", use_activation=False), wanted)
        with pytest.raises(RequestError, match="outside of 0"):
            core.add(requests(core, [[2 * tiny.VOCAB]], task="classify")[0])
    finally:
        core.close()


CONDITIONS = {
    "alone": {"max_num_seqs": 1},
    "without overlap": {"async_scheduling": False},
    "chunks of 8": {"max_num_batched_tokens": 8},
    "a pool that is too small": {"num_gpu_blocks_override": 8, "max_model_len": 48},
}


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("name", ["llama", "bert", "llama-classes"])
def test_how_a_prompt_is_scheduled_does_not_show(folder, name, condition):
    """Bit for bit: a replica that takes over a request gives what the lost one would have."""
    ways = [{"task": "classify"}] if name == "llama-classes" else [{"pooling_type": way} for way in WAYS]
    plain, other = start(folder(name)), start(folder(name), **CONDITIONS[condition])
    try:
        for number, params in enumerate(ways):
            wanted, found = (pool(core, tag=str(number), **params) for core in (plain, other))
            for one, two in zip(wanted, found, strict=True):
                np.testing.assert_array_equal(one, two)
    finally:
        plain.close()
        other.close()


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_prompts_that_come_together_are_prompts_all_the_same(folder, name):
    core = start(folder(name), max_num_seqs=3)
    try:
        alone = pool(core, pooling_type="mean")
        wanted = core.scheduler.limits.pooling.resolve(PoolingParams(pooling_type="mean"))
        core.add(pooling_request("all", [tuple(prompt) for prompt in PROMPTS], wanted))
        found = {}
        while core.has_work:
            found |= {delta.index: delta for delta in core.step()}
        assert all(delta.finish_reason == "stop" for delta in found.values())
        for index, vector in enumerate(alone):
            np.testing.assert_array_equal(np.frombuffer(found[index].pooled, "<f4"), vector)
    finally:
        core.close()


def test_only_the_last_token_is_pooled_behind_prefix_hits(folder):
    core = start(folder("llama"))
    try:
        for way in WAYS:
            first, again = (pool(core, tag=tag + way, pooling_type=way) for tag in "ab")
            for one, two in zip(first, again, strict=True):
                np.testing.assert_array_equal(one, two)
        hits = core.stats().prefix_hits
        pool(core, tag="mean", pooling_type="mean")
        pool(core, tag="skip", pooling_type="last", skip_reading_prefix_cache=True)
        assert core.stats().prefix_hits == hits > 0
    finally:
        core.close()


def test_pooling_beside_generation_changes_neither(folder):
    prompts = tiny.prompts((12, 33, 7, 20), seed=1)
    texts = [Request(f"g{i}", tuple(prompt), GREEDY) for i, prompt in enumerate(prompts)]
    core = start(folder("llama"))
    try:
        alone = run(core, texts)
        vectors = {way: pool(core, tag=way, pooling_type=way) for way in WAYS}
    finally:
        core.close()
    mixed = start(folder("llama"), max_num_batched_tokens=24, num_gpu_blocks_override=14, max_model_len=64)
    try:
        pooling = [request for way in WAYS for request in requests(mixed, tag=way, pooling_type=way)]
        order = [item for pair in zip(pooling[:4], texts, strict=True) for item in pair] + pooling[4:]
        found = run(mixed, order)
        assert mixed.stats().preemptions > 0
    finally:
        mixed.close()
    assert {name: found[name] for name in alone} == alone
    for way in WAYS:
        for i, vector in enumerate(vectors[way]):
            np.testing.assert_array_equal(found[f"{way}{i}"], vector)


@pytest.fixture
def _one_thread_each():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_thread_each")
@pytest.mark.parametrize("layout", [(2, 1), (1, 3), (2, 2)], ids=["tp2", "pp3", "tp2-pp2"])
@pytest.mark.parametrize("name", ["bert", "roberta-classes", "llama", "qwen3-cross"])
def test_several_ranks_pool_like_one(folder, name, layout):
    tp, pp = layout
    options = OPTIONS | {"num_gpu_blocks_override": 20, "max_num_batched_tokens": 24, "max_model_len": 64}
    config = EngineConfig(str(folder(name)), tensor_parallel_size=tp, pipeline_parallel_size=pp, **options)
    ranks = Ranks(config, Layout(tp, pp), Threads(), Deadlines(hang_s=60), Phases(None))
    core = assemble(config, ranks.info, ranks).core
    try:
        if name in tiny.CLASSIFIERS:
            wanted = [tiny.logits(reference(name), prompt) for prompt in PROMPTS]
            expect(pool(core, task="classify", use_activation=False), wanted)
        else:
            for way in WAYS:
                expect(pool(core, tag=way, pooling_type=way), [tiny.pooled(each, way) for each in states(name)])
    finally:
        core.close()


@pytest.mark.parametrize(("options", "tolerance"), [({"dtype": "bfloat16"}, 0.1), ({"quantization": "int8"}, 0.1)])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_other_number_formats_come_close(folder, name, options, tolerance):
    core = start(folder(name), **options)
    try:
        for got, each in zip(pool(core, pooling_type="mean"), states(name), strict=True):
            assert float(got @ tiny.pooled(each, "mean").numpy()) > 1 - tolerance
    finally:
        core.close()


def test_what_a_model_is_served_for(folder):
    def info(name, **options):
        return build_engine(EngineConfig(str(folder(name)), **OPTIONS | options)).info.pooling

    assert info("llama").generates
    assert info("llama").embedding_size == 32
    assert not info("llama", convert="none").embeds
    assert not info("llama", runner="pooling").generates
    assert info("opt-narrow").embedding_size == 16
    assert info("bert").pooling_type == "mean"
    changed = info("bert", pooler_config='{"pooling_type": "CLS", "normalize": false, "is_matryoshka": true}')
    assert (changed.pooling_type, changed.normalize, changed.is_matryoshka) == ("cls", False, True)
    for name, options, message in (
        ("bert", {"runner": "generate"}, "BertModel has no head"),
        ("bert", {"convert": "classify"}, "BertModel has no classes"),
        ("bert-cross", {"convert": "embed"}, "made for its classes"),
        ("bert-cross", {"pooler_config": '{"pooling_type": "MEAN"}'}, "not made of its mean"),
    ):
        with pytest.raises(ConfigError, match=message):
            info(name, **options)


def test_a_decoder_in_a_sentence_transformers_folder_is_for_embeddings_alone(folder, tmp_path):
    """As Qwen3-Embedding comes: …ForCausalLM by name, the last token's state by modules.json, shortened if asked to."""
    path = tmp_path / "model"
    shutil.copytree(folder("llama"), path)
    (path / "1_Pooling").mkdir()
    modules = [("0", "", "Transformer"), ("1", "1_Pooling", "Pooling"), ("2", "2_Normalize", "Normalize")]
    written = [
        {"idx": int(name), "name": name, "path": where, "type": f"sentence_transformers.models.{kind}"}
        for name, where, kind in modules
    ]
    for name, value in {
        "modules.json": written,
        "1_Pooling/config.json": {"word_embedding_dimension": 32, "pooling_mode_lasttoken": True},
        "sentence_bert_config.json": {"max_seq_length": 60},
        "config_sentence_transformers.json": {"prompts": {"query": "Find: ", "document": ""}},
        "config.json": json.loads((path / "config.json").read_text()) | {"matryoshka_dimensions": [8, 16]},
    }.items():
        (path / name).write_text(json.dumps(value))
    engine = build_engine(EngineConfig(str(path), **OPTIONS))
    try:
        assert engine.info.max_model_len == 60
        assert engine.info.pooling == PoolingInfo(
            generates=False,
            embedding_size=32,
            is_matryoshka=True,
            dimensions=(8, 16),
            prompts=(("query", "Find: "), ("document", "")),
        )
        expect(pool(engine.core), [tiny.pooled(each, "last") for each in states("llama")])
        shorter = [torch.nn.functional.normalize(each[-1, :8], dim=0) for each in states("llama")]
        expect(pool(engine.core, tag="s", dimensions=8), shorter)
    finally:
        engine.core.close()


@pytest.mark.parametrize("text", ["[1]", "{", '{"pooling_type": "MAX"}', '{"normalize": 1}', '{"step_tag_id": 3}'])
def test_a_wrong_pooler_config_is_refused_before_anything_else(text):
    with pytest.raises(ConfigError, match="pooler_config"):
        EngineConfig(pooler_config=text)


def test_an_encoder_keeps_no_kv_and_takes_prompts_of_its_full_length(folder):
    core = start(folder("roberta"), num_gpu_blocks_override=None, max_num_batched_tokens=16)
    try:
        limits = core.scheduler.limits
        assert (limits.max_model_len, limits.max_num_batched_tokens) == (tiny.MAX_LEN, tiny.MAX_LEN)
        longest = tiny.prompts((tiny.MAX_LEN,), seed=3)
        expect(pool(core, longest), [tiny.pooled(tiny.hidden_states(reference("roberta"), longest[0]), "mean")])
        with pytest.raises(RequestError, match="129 tokens"):
            core.add(requests(core, tiny.prompts((tiny.MAX_LEN + 1,)))[0])
        with pytest.raises(RequestError, match="generates no text"):
            core.add(Request("g", (5, 6), GREEDY))
        assert core.stats().kv_blocks_cached == 0
    finally:
        core.close()

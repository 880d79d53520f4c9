"""Requests that generate nothing, beside those that do: the scheduler's invariants, and what they may read from the
prefix cache. FakeRunner refuses to pool a position that was not computed in the sequence's slot.
"""

import struct
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.engine.errors import RequestError
from octavo.engine.pooling.info import PoolingInfo
from octavo.engine.pooling.params import PoolingParams
from octavo.engine.pooling.prompts import pooling_request
from octavo.engine.runner.fake import FAKE_EMBEDDING

sys.path.insert(0, str(Path(__file__).parent))
from harness import Collector, check_invariants, engine, expected, request, run

INFO = PoolingInfo(embedding_size=FAKE_EMBEDDING)
WAYS = ("last", "mean", "cls")

prompts = st.one_of(
    st.lists(st.integers(1, 31), min_size=1, max_size=90),
    st.builds(lambda n, tail: [5] * n + tail, st.integers(1, 60), st.lists(st.integers(1, 3), max_size=3)),
)
added = st.tuples(
    st.just("add"), st.lists(prompts, min_size=1, max_size=4), st.sampled_from([None, *WAYS, *WAYS]), st.integers(-2, 2)
)
events = st.one_of(
    added,
    added,
    st.tuples(st.just("abort"), st.integers(0, 20)),
    st.tuples(st.just("step"), st.integers(1, 6)),
)


def pooled(name: str, prompts: list[list[int]], way: str, priority: int = 0, **params: object):
    wanted = INFO.resolve(PoolingParams(pooling_type=way, **params))
    return pooling_request(name, [tuple(prompt) for prompt in prompts], wanted, priority=priority)


def vectors(got: Collector) -> dict[tuple[str, int], bytes]:
    return {(delta.request_id, delta.index): delta.pooled for delta in got.deltas if delta.pooled is not None}


def alone(prompt: tuple[int, ...], pooling: PoolingParams) -> bytes:
    core, got = engine(pooling=INFO, caching=False), Collector()
    core.add(pooling_request("alone", [prompt], pooling))
    run(core, got)
    return vectors(got)["alone", 0]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(events, max_size=25),
    st.fixed_dictionaries(
        {
            "num_blocks": st.sampled_from([16, 17, 20, 40, 64]),
            "caching": st.booleans(),
            "lag": st.integers(0, 3),
            "stages": st.sampled_from([1, 1, 2, 3]),
            "max_num_seqs": st.integers(1, 8),
            "max_num_batched_tokens": st.sampled_from([8, 9, 32, 200]),
            "scheduling_policy": st.sampled_from(["fcfs", "priority"]),
            "long_prefill_token_threshold": st.sampled_from([0, 0, 5]),
        }
    ),
)
def test_random_workloads_of_both_kinds(todo, config):
    core, got, sent, aborted = engine(pooling=INFO, **config), Collector(), {}, set()
    for event in todo:
        if event[0] == "add":
            _, several, way, priority = event
            name = f"r{len(sent)}"
            made = pooled(name, several, way or "last", priority)
            if way is None:
                made = request(name, several[0], priority, max_tokens=9)
            core.add(made)
            sent[name] = made
        elif event[0] == "abort":
            got.take(core.abort(f"r{event[1]}"))
            aborted.add(f"r{event[1]}")
            check_invariants(core)
        else:
            for _ in range(event[1]):
                got.take(core.step())
                check_invariants(core)
    run(core, got)
    found = vectors(got)
    for name, made in sent.items():
        if name in aborted:
            continue
        if made.pooling is None:
            assert got.tokens[name, 0] == expected(made)
        else:
            for index, prompt in enumerate(made.prompts):
                assert (got.tokens[name, index], got.reasons[name, index]) == ([], "stop")
                assert found[name, index] == alone(prompt, made.pooling)
    stats = core.stats()
    assert (stats.num_running, stats.num_waiting, stats.waiting_tokens, stats.kv_blocks_held) == (0, 0, 0, 0)


def test_a_pooled_prompt_leaves_its_blocks_for_others_and_takes_theirs_only_where_it_may():
    core, got = engine(pooling=INFO), Collector()
    prompt = [4] * 64
    for name, way in (("a", "mean"), ("b", "last"), ("c", "mean"), ("d", "cls")):
        core.add(pooled(name, [prompt], way))
        run(core, got)
    core.add(request("e", prompt, max_tokens=3))
    run(core, got)
    cached = {delta.request_id: delta.num_cached_tokens for delta in got.deltas}
    assert cached == {"a": 0, "b": 64, "c": 0, "d": 0, "e": 64}
    assert len(vectors(got)["a", 0]) == 4 * FAKE_EMBEDDING


def test_times_are_told_with_the_result():
    core, got = engine(pooling=INFO), Collector()
    core.add(pooled("a", [[1, 2, 3]], "last"))
    run(core, got)
    assert got.deltas[-1].times is not None
    assert (core.stats().first_tokens, core.stats().generation_tokens, core.stats().prompt_tokens) == (1, 0, 3)


def test_an_encoder_s_prompt_is_computed_whole():
    info = PoolingInfo(generates=False, is_causal=False, embedding_size=FAKE_EMBEDDING, pooling_type="mean")
    core, got = (
        engine(pooling=info, enable_chunked_prefill=False, max_num_batched_tokens=128, caching=False),
        Collector(),
    )
    widths = []
    launch = core.process.launch
    core.process.launch = lambda plan: (widths.extend(row.num_tokens for row in plan.rows), launch(plan))
    for i in range(4):
        core.add(pooled(f"r{i}", [[i + 1] * (60 + i)], "mean"))
    core.add(pooled("longest", [[9] * 128], "mean"))
    run(core, got)
    assert widths == [60, 61, 62, 63, 128]
    with pytest.raises(RequestError, match="generates no text"):
        core.add(request("g", [1, 2]))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (pooled("a", [[1], [1] * 129], "last"), "129 tokens, but the model's context holds 128"),
        (pooled("a", [[1], []], "last"), "empty"),
        (pooled("a", [[32]], "last"), "outside of 0 … 31"),
        (pooling_request("a", [(1,)], PoolingParams()), "not resolved"),
        (pooling_request("a", [(1,)], PoolingParams(task="classify")), "no classes"),
    ],
)
def test_what_can_never_be_pooled_is_refused(made, message):
    core = engine(pooling=INFO)
    with pytest.raises(RequestError, match=message):
        core.add(made)


MATRYOSHKA = PoolingInfo(embedding_size=64, is_matryoshka=True, dimensions=(16, 32))


@pytest.mark.parametrize(
    ("info", "params", "message"),
    [
        (PoolingInfo(embedding_size=64), {"dimensions": 32}, "64 dimensions and were not trained"),
        (MATRYOSHKA, {"dimensions": 65}, "at most 64"),
        (MATRYOSHKA, {"dimensions": 8}, "one of 16, 32"),
        (PoolingInfo(), {}, "no embeddings"),
        (PoolingInfo(embedding_size=64), {"task": "classify"}, "no classes"),
        (PoolingInfo(labels=("a",)), {"task": "classify", "dimensions": 3}, "for embeddings"),
        (PoolingInfo(labels=("a",)), {"task": "classify", "pooling_type": "mean"}, "last token"),
    ],
)
def test_what_a_model_cannot_do_is_refused_by_name(info, params, message):
    with pytest.raises(RequestError, match=message):
        info.resolve(PoolingParams(**params))


@pytest.mark.parametrize(
    ("field", "value"),
    [("task", "token_embed"), ("pooling_type", "max"), ("dimensions", 0), ("dimensions", True), ("normalize", 1)],
)
def test_values_that_mean_nothing_name_their_field(field, value):
    with pytest.raises(RequestError) as caught:
        PoolingParams(**{field: value})
    assert caught.value.param == field


def test_dimensions_shorten_and_normalize_after():
    core, got = engine(pooling=PoolingInfo(embedding_size=FAKE_EMBEDDING, is_matryoshka=True)), Collector()
    wanted = core.scheduler.limits.pooling.resolve(PoolingParams(dimensions=3))
    core.add(pooling_request("a", [(1, 2)], wanted))
    run(core, got)
    assert len(struct.unpack("<3f", vectors(got)["a", 0])) == 3

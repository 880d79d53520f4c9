"""Beam search in the scheduler: whatever else runs and however little room there is, the result is the search's own."""

import sys
from functools import cache
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.engine.beam import Beams, BeamSearch
from octavo.engine.errors import RequestError
from octavo.engine.types import Resumed, TokenLogprobs

sys.path.insert(0, str(Path(__file__).parent))
from harness import EOS, VOCAB, Collector, check_invariants, engine, expected, request, run

from octavo.engine.runner.fake import mix


@cache
def candidates(state: int) -> list[tuple[int, float]]:
    """Log probabilities of all tokens after `state`; the end token is likely enough to matter."""
    dice = Random(state)
    found = [(token, -3.0 * dice.random() - (0.0 if token != EOS else 0.5)) for token in range(VOCAB)]
    return sorted(found, key=lambda item: -item[1])


def scores_of(state: int) -> TokenLogprobs:
    tokens, values = zip(*candidates(state), strict=True)
    return TokenLogprobs((-1, *tokens), (0.0, *values), 1)


def searched(made, max_model_len: int = 128) -> list[tuple[list[int], str]]:
    """What the search finds by itself: no scheduler, no blocks."""
    params, prompt = made.params, made.prompt_token_ids
    stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else {EOS})
    longest = max_model_len - len(prompt)
    search = BeamSearch(
        params.beams,
        stops,
        params.min_tokens,
        longest if params.max_tokens is None else min(longest, params.max_tokens),
    )
    state = 0
    for token in prompt:
        state = mix(state, token)
    states = [state]
    while not search.done:
        forks = search.advance([scores_of(state) for state in states])
        states = [mix(states[fork.parent], fork.token) for fork in forks]
    return [
        ([step.token for step in beam.last.path()], "stop" if beam.stopped else "length")
        for beam in search.best(params.n)
    ]


beam_requests = st.fixed_dictionaries(
    {
        "prompt": st.lists(st.integers(1, 31), min_size=1, max_size=60),
        "width": st.integers(1, 6),
        "length_penalty": st.sampled_from([0.0, 1.0, 2.5, -1.0]),
        "early_stopping": st.sampled_from([True, False, "never"]),
        "max_tokens": st.integers(1, 25),
        "min_tokens": st.sampled_from([0, 0, 3]),
        "ignore_eos": st.booleans(),
        "stop_token_ids": st.sampled_from([(), (9, 11)]),
        "logprobs": st.sampled_from([None, 0, 3]),
        "prompt_logprobs": st.sampled_from([None, None, 1]),
    }
)
events = st.one_of(
    st.tuples(st.just("beams"), beam_requests),
    st.tuples(st.just("plain"), st.lists(st.integers(1, 31), min_size=1, max_size=60)),
    st.tuples(st.just("abort"), st.integers(0, 8)),
    st.tuples(st.just("step"), st.integers(1, 9)),
)


def beam_request(name: str, options: dict):
    options = dict(options)
    width = options.pop("width")
    beams = Beams(width, options.pop("length_penalty"), options.pop("early_stopping"))
    options["min_tokens"] = min(options["min_tokens"], options["max_tokens"])
    return request(name, options.pop("prompt"), n=max(1, width - 1), beams=beams, **options)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(events, min_size=1, max_size=12),
    st.fixed_dictionaries(
        {
            "num_blocks": st.sampled_from([16, 17, 20, 40, 100]),
            "caching": st.booleans(),
            "lag": st.integers(0, 2),
            "stages": st.sampled_from([1, 1, 1, 2]),
            "max_num_seqs": st.integers(1, 8),
            "max_num_batched_tokens": st.sampled_from([8, 9, 32, 200]),
            "scheduling_policy": st.sampled_from(["fcfs", "priority"]),
        }
    ),
)
def test_random_workloads_find_what_the_search_finds(todo, config):
    core, got, sent, aborted = engine(candidates=candidates, **config), Collector(), {}, set()
    for kind, value in todo:
        name = f"r{len(sent)}"
        if kind == "beams":
            sent[name] = beam_request(name, value)
            core.add(sent[name])
        elif kind == "plain":
            sent[name] = request(name, value, max_tokens=20, n=2)
            core.add(sent[name])
        elif kind == "abort":
            got.take(core.abort(f"r{value}"))
            aborted.add(f"r{value}")
            check_invariants(core)
        else:
            for _ in range(value):
                got.take(core.step())
                check_invariants(core)
    run(core, got, 20000)
    for name, made in sent.items():
        if name in aborted:
            continue
        if made.params.beams is None:
            assert [got.tokens[name, i] for i in range(2)] == [expected(made, i) for i in range(2)]
            continue
        found = [(got.tokens[name, i], got.reasons[name, i]) for i in range(made.params.n)]
        assert found == searched(made)
        first = next(d for d in got.deltas if (d.request_id, d.index) == (name, 0))
        assert len(first.logprobs) == (0 if made.params.logprobs is None else len(first.token_ids))
        assert all(len(entry.token_ids) == 1 + made.params.logprobs for entry in first.logprobs)
        assert [entry.token_ids[0] for entry in first.logprobs] == list(first.token_ids)[: len(first.logprobs)]
        assert (first.prompt_logprobs is None) == (made.params.prompt_logprobs is None)
    stats = core.stats()
    assert (stats.num_running, stats.num_waiting, stats.waiting_tokens, stats.kv_blocks_held) == (0, 0, 0, 0)


def test_beams_share_the_blocks_of_what_they_have_in_common():
    core, got = engine(candidates=candidates, caching=False, num_blocks=200), Collector()
    core.add(beam_request("r", {"prompt": [5] * 60, "width": 4, "length_penalty": 1.0, "early_stopping": False,
                                "max_tokens": 40, "min_tokens": 0, "ignore_eos": True}))  # fmt: skip
    held, rows = [], []
    launch = core.process.launch
    core.process.launch = lambda plan: (rows.append([row.num_tokens for row in plan.rows]), launch(plan))
    while core.has_work:
        got.take(core.step())
        check_invariants(core)
        held.append(core.stats().kv_blocks_held)
    assert max(held) <= 13 + 3 * 4  # one beam's 100 positions, and what little the others have of their own
    prefill = [count for step in rows[:3] for count in step if count > 1]
    assert sum(prefill) == 60 - sum(count == 1 for count in rows[0])
    assert all(count == 1 for step in rows[3:] for count in step), "a fork computes nothing twice"
    assert core.stats().preemptions == 0


def test_an_abort_frees_everything_at_once():
    core, got = engine(candidates=candidates), Collector()
    options = {"prompt": [3] * 50, "width": 5, "length_penalty": 1.0, "early_stopping": False, "max_tokens": 40,
               "min_tokens": 0, "ignore_eos": True}  # fmt: skip
    core.add(beam_request("r", options))
    for _ in range(8):
        got.take(core.step())
    assert core.stats().num_running > 1
    got.take(core.abort("r"))
    assert core.stats().kv_blocks_held == 0
    assert [got.reasons["r", i] for i in range(4)] == ["abort"] * 4
    run(core, got)
    assert not core.scheduler.is_live("r")


def test_a_search_that_is_resumed_elsewhere_tells_the_rest():
    options = {"prompt": [3] * 20, "width": 4, "length_penalty": 1.0, "early_stopping": False, "max_tokens": 9,
               "min_tokens": 0, "ignore_eos": False}  # fmt: skip
    made = beam_request("r", options)
    from dataclasses import replace

    core, got = engine(candidates=candidates), Collector()
    core.add(replace(made, resume=(Resumed(2), Resumed(0))))
    run(core, got)
    assert {index: got.tokens["r", index] for _, index in got.tokens} == {
        0: searched(made)[0][0],
        2: searched(made)[2][0],
    }


def test_a_failed_step_ends_the_whole_search():
    from octavo.engine.errors import StepError

    core, got = engine(candidates=candidates, lag=0), Collector()
    core.add(request("bad", [3] * 20, n=2, max_tokens=30, beams=Beams(3)))
    for _ in range(3):
        got.take(core.step())
    collect = core.process.collect

    def broken():
        collect()
        core.process.collect = collect
        raise StepError("boom")

    core.process.collect = broken
    got.take(core.step())
    assert [got.reasons["bad", i] for i in range(2)] == ["error"] * 2
    run(core, got)
    assert core.stats().kv_blocks_held == 0


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"n": 3, "beams": Beams(2)}, "n"),
        ({"beams": Beams(2), "presence_penalty": 1.0}, "presence_penalty"),
        ({"beams": Beams(2), "repetition_penalty": 1.1}, "repetition_penalty"),
        ({"beams": Beams(2), "logit_bias": {1: 2.0}}, "logit_bias"),
        ({"beams": Beams(2), "allowed_token_ids": (1,)}, "allowed_token_ids"),
        ({"beams": Beams(2), "bad_words": ("x",)}, "bad_words"),
        ({"beams": Beams(2), "stop": ("x",)}, "stop"),
        ({"beams": 4}, "beams"),
        ({"beams": Beams(32)}, "n"),  # 31 tokens beside the end token
    ],
)
def test_what_cannot_be_searched_is_refused(params, param):
    core = engine()
    with pytest.raises(RequestError) as refused:
        core.add(request("r", [1, 2], **params))
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ((0,), "n"), ((129,), "n"), ((True,), "n"), ((2.0,), "n"), ((2, float("nan")), "length_penalty"),
        ((2, "x"), "length_penalty"), ((2, 1e9), "length_penalty"), ((2, 1.0, "always"), "early_stopping"),
        ((2, 1.0, 1), "early_stopping"),
    ],
)  # fmt: skip
def test_wrong_beams(values, param):
    with pytest.raises(RequestError) as refused:
        Beams(*values)
    assert refused.value.param == param

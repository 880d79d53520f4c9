"""A request cut anywhere and resumed on a fresh engine gives what it would have given undisturbed, and not twice."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.engine.errors import RequestError
from octavo.engine.types import Resumed

sys.path.insert(0, str(Path(__file__).parent))
from harness import Collector, engine, expected, request, run

requests = st.fixed_dictionaries(
    {
        "prompt": st.lists(st.integers(1, 31), min_size=1, max_size=60),
        "max_tokens": st.one_of(st.none(), st.integers(1, 40)),
        "min_tokens": st.sampled_from([0, 0, 1, 7]),
        "temperature": st.sampled_from([0.0, 1.0]),
        "ignore_eos": st.booleans(),
        "n": st.sampled_from([1, 1, 2, 4]),
        "seed": st.integers(0, 3),
        "logprobs": st.sampled_from([None, 2]),
        "prompt_logprobs": st.sampled_from([None, None, 1]),
        "stop_token_ids": st.sampled_from([(), (9,), (9, 11)]),
    }
)
configs = st.fixed_dictionaries(
    {
        "num_blocks": st.sampled_from([16, 17, 40, 64]),
        "caching": st.booleans(),
        "lag": st.integers(0, 2),
        "max_num_seqs": st.integers(1, 8),
        "max_num_batched_tokens": st.sampled_from([8, 9, 32, 200]),
    }
)


def resumed(made, deltas):
    """The request that goes on behind `deltas`; None if all its sequences have ended."""
    ended = {d.index for d in deltas if d.finish_reason}
    left = [i for i in range(made.params.n) if i not in ended]
    tokens = {i: tuple(t for d in deltas if d.index == i for t in d.token_ids) for i in left}
    return replace(made, resume=tuple(Resumed(i, tokens[i]) for i in left)) if left else None


def finish(core, made):
    """All deltas of `made`, with `core` checked and empty at the end."""
    got = Collector()
    got.take(core.add(made))
    run(core, got)
    stats = core.stats()
    assert (stats.num_running, stats.num_waiting, stats.waiting_tokens, stats.kv_blocks_held) == (0, 0, 0, 0)
    return got


@settings(max_examples=500, deadline=None)
@given(requests, configs, configs, st.integers(0, 200), st.booleans(), st.booleans())
def test_cut_anywhere_and_resumed_it_is_the_undisturbed_run(options, first, second, cut, lose_the_end, warm):
    if options["temperature"] == 0:
        options["n"] = 1
    options["min_tokens"] = min(options["min_tokens"], options["max_tokens"] or 7)
    prompt = options.pop("prompt")
    made = request("r", prompt, **options)
    whole = finish(engine(**first), made)
    before = whole.deltas[: cut % (len(whole.deltas) + 1)]
    if lose_the_end and before:  # the last token came, the word that it was the last did not
        before[-1] = replace(before[-1], finish_reason=None, stop_reason=None)
    core = engine(**second)
    if warm:
        finish(core, made)  # its blocks are found again, output included
    generated = core.stats().generation_tokens
    rest = resumed(made, before)
    after = finish(core, rest).deltas if rest else []

    assert core.stats().generation_tokens - generated == sum(len(d.token_ids) for d in after)
    both = before + after
    for index in range(made.params.n):
        mine = [d for d in both if d.index == index]
        assert [t for d in mine for t in d.token_ids] == expected(made, index)
        entries = [entry for d in mine for entry in d.logprobs]
        assert entries == [entry for d in whole.deltas if d.index == index for entry in d.logprobs]
        ends = [(d.finish_reason, d.stop_reason) for d in mine if d.finish_reason]
        assert ends == [(d.finish_reason, d.stop_reason) for d in whole.deltas if d.index == index and d.finish_reason]
    scores = [d.prompt_logprobs for d in both if d.prompt_logprobs is not None]
    assert len(scores) == (made.params.prompt_logprobs is not None)
    assert all(d.num_cached_tokens <= len(prompt) for d in after)


def test_what_has_reached_its_end_ends_at_once():
    for tokens, reason, stop_reason in ([3, 3, 3], "length", None), ([3, 9], "stop", 9), ([0], "stop", None):
        core = engine()
        made = request("r", [1, 2], max_tokens=3, stop_token_ids=(9,))
        (end,) = core.add(replace(made, resume=(Resumed(0, tuple(tokens)),)))
        assert (end.token_ids, end.finish_reason, end.stop_reason) == ((), reason, stop_reason)
        assert not core.has_work
        assert not core.scheduler.is_live("r")


def test_a_stop_token_below_min_tokens_does_not_end_it():
    core = engine()
    made = request("r", [1, 2], max_tokens=9, min_tokens=5)
    assert core.add(replace(made, resume=(Resumed(0, (4, 0)),))) == []


def test_a_preempted_resumed_sequence_is_counted_by_what_it_brought():
    core, got = engine(num_blocks=16, max_num_seqs=4), Collector()
    made = [request(f"r{i}", [i + 1] * 20, max_tokens=60, ignore_eos=True) for i in range(4)]
    for item in made:
        core.add(replace(item, resume=(Resumed(0, tuple(expected(item)[:20])),)))
    assert core.stats().waiting_tokens == 4 * 40
    run(core, got)
    assert core.stats().preemptions > 0
    assert all(got.tokens[item.request_id, 0] == expected(item)[20:] for item in made)


@pytest.mark.parametrize(
    "resume", [(Resumed(1),), (Resumed(-1),), (Resumed(0), Resumed(0)), (Resumed(0, (32,)),), (Resumed(0, (-1,)),)]
)
def test_what_cannot_be_resumed_is_refused(resume):
    with pytest.raises(RequestError) as caught:
        engine().add(replace(request("r", [1]), resume=resume))
    assert caught.value.param == "resume"

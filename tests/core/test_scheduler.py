"""The scheduler against its invariants, by random workloads and by named cases."""

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.engine.errors import CapacityError, RequestError

sys.path.insert(0, str(Path(__file__).parent))
from harness import Collector, check_invariants, engine, expected, request, run

prompts = st.one_of(
    st.lists(st.integers(1, 31), min_size=1, max_size=90),
    # shared beginnings of every length around block borders
    st.builds(lambda n, tail: [5] * n + tail, st.integers(1, 60), st.lists(st.integers(1, 3), max_size=3)),
)
requests = st.fixed_dictionaries(
    {
        "prompt": prompts,
        "priority": st.integers(-2, 2),
        "salt": st.sampled_from([None, None, "tenant"]),
        "max_tokens": st.one_of(st.none(), st.integers(1, 40)),
        "temperature": st.sampled_from([0.0, 1.0]),
        "ignore_eos": st.booleans(),
        "n": st.sampled_from([1, 1, 1, 2, 4]),
        "seed": st.integers(0, 3),
        "prompt_logprobs": st.sampled_from([None, None, None, 1]),
        "stop_token_ids": st.sampled_from([(), (9,), (9, 11)]),
    }
)
events = st.one_of(
    st.tuples(st.just("add"), requests),
    st.tuples(st.just("abort"), st.integers(0, 20)),
    st.tuples(st.just("step"), st.integers(1, 6)),
)


@settings(max_examples=1000, deadline=None)
@given(
    st.lists(events, max_size=25),
    st.fixed_dictionaries(
        {
            "num_blocks": st.sampled_from([16, 17, 20, 40, 64]),
            "caching": st.booleans(),
            "lag": st.integers(0, 3),
            "stages": st.sampled_from([1, 1, 2, 3, 4]),
            "max_num_seqs": st.integers(1, 8),
            "max_num_batched_tokens": st.sampled_from([8, 9, 32, 200]),
            "scheduling_policy": st.sampled_from(["fcfs", "priority"]),
            "long_prefill_token_threshold": st.sampled_from([0, 0, 5]),
        }
    ),
)
def test_random_workloads_keep_the_invariants_and_give_the_right_tokens(todo, config):
    core, got, sent, aborted = engine(**config), Collector(), {}, set()
    for kind, value in todo:
        if kind == "add":
            options = dict(value)
            if options["temperature"] == 0:
                options["n"] = 1
            made = request(
                f"r{len(sent)}", options.pop("prompt"), options.pop("priority"), options.pop("salt"), **options
            )
            core.add(made)
            sent[made.request_id] = made
        elif kind == "abort":
            name = f"r{value}"
            got.take(core.abort(name))
            aborted.add(name)
            check_invariants(core)
        else:
            for _ in range(value):
                got.take(core.step())
                check_invariants(core)
    run(core, got)

    for name, made in sent.items():
        for index in range(made.params.n):
            tokens, want = got.tokens[name, index], expected(made, index)
            if name in aborted:
                assert tokens == want[: len(tokens)]
            else:
                assert tokens == want
                assert got.reasons[name, index] in ("stop", "length")
        if made.params.prompt_logprobs and name not in aborted:
            entries = next(d for d in got.deltas if d.request_id == name and d.index == 0).prompt_logprobs
            assert entries[0] is None
            assert [e.token_ids[0] for e in entries[1:]] == list(made.prompt_token_ids[1:])
    stats = core.stats()
    assert (stats.num_running, stats.num_waiting, stats.waiting_tokens, stats.kv_blocks_held) == (0, 0, 0, 0)


def test_whole_prompts_wait_for_a_step_that_holds_them_when_chunking_is_off():
    core, got = engine(enable_chunked_prefill=False, max_num_batched_tokens=64), Collector()
    made = [request(f"r{i}", [i + 1] * 40, max_tokens=5, ignore_eos=True) for i in range(4)]
    for item in made:
        core.add(item)
    widths = []
    launch = core.process.launch
    core.process.launch = lambda plan: (widths.extend(row.num_tokens for row in plan.rows), launch(plan))
    run(core, got)
    assert set(widths) == {40, 1}
    assert all(got.tokens[r.request_id, 0] == expected(r) for r in made)


def test_a_long_prompt_does_not_stop_running_sequences():
    core, got = engine(max_num_batched_tokens=16), Collector()
    core.add(request("short", [1, 2], max_tokens=100, ignore_eos=True))
    for _ in range(4):
        got.take(core.step())
    core.add(request("long", [3] * 100, max_tokens=4, ignore_eos=True))
    before = len(got.tokens["short", 0])
    for _ in range(6):
        got.take(core.step())
    assert len(got.tokens["short", 0]) - before >= 5


def test_a_repeated_prompt_is_found_and_only_its_last_token_computed_again():
    core, got = engine(), Collector()
    core.add(request("a", [4] * 64, max_tokens=2))
    run(core, got)
    plans = []
    launch = core.process.launch
    core.process.launch = lambda plan: (plans.append(plan), launch(plan))
    core.add(request("b", [4] * 64, max_tokens=2))
    run(core, got)
    assert plans[0].rows[0].num_tokens == 1
    assert plans[0].rows[0].write_from == 64
    assert next(d for d in got.deltas if d.request_id == "b").num_cached_tokens == 64
    assert got.tokens["a", 0] == got.tokens["b", 0]


def test_requests_that_arrive_together_share_one_computation_of_their_prefix():
    core, got = engine(max_num_batched_tokens=200), Collector()
    for name in ("a", "b", "c"):
        core.add(request(name, [6] * 48 + [ord(name) % 32], max_tokens=3))
    run(core, got)
    stats = core.stats()
    assert stats.prefix_hits == 2 * 48
    assert all(len(got.tokens[name, 0]) for name in "abc")


def test_another_salt_does_not_find_the_prefix():
    core, got = engine(), Collector()
    for name, salt in (("a", "x"), ("b", "y"), ("c", "x")):
        core.add(request(name, [4] * 40, salt=salt, max_tokens=2))
        run(core, got)
    cached = {d.request_id: d.num_cached_tokens for d in got.deltas}
    assert cached == {"a": 0, "b": 0, "c": 40}


def test_samples_share_their_prompt_and_copy_the_last_block_on_write():
    core, got = engine(num_blocks=64, caching=False), Collector()
    made = request("r", [7] * 60, n=4, max_tokens=20, ignore_eos=True)
    core.add(made)
    held = []
    copies = []
    launch = core.process.launch
    core.process.launch = lambda plan: (copies.extend(plan.copies), launch(plan))
    while core.has_work:
        got.take(core.step())
        check_invariants(core)
        held.append(core.scheduler.pool.num_held)
    assert max(held) <= 7 + 4 * 4  # 7 full prompt blocks once, at most 4 blocks of its own each
    assert len(copies) == 3  # the last of the four writes in place
    assert all(got.tokens["r", i] == expected(made, i) for i in range(4))


def test_an_abort_frees_everything_at_once():
    core, got = engine(), Collector()
    core.add(request("r", [3] * 50, n=2, max_tokens=30, ignore_eos=True))
    for _ in range(4):
        got.take(core.step())
    assert core.stats().kv_blocks_held > 0
    got.take(core.abort("r"))
    assert core.stats().kv_blocks_held == 0
    assert {got.reasons["r", 0], got.reasons["r", 1]} == {"abort"}
    core.abort("r")
    run(core, got)


def test_preemption_recomputes_and_changes_nothing():
    core, got = engine(num_blocks=16), Collector()
    made = [request(f"r{i}", [i + 1] * 20, max_tokens=60, ignore_eos=True, temperature=0) for i in range(5)]
    for item in made:
        core.add(item)
    run(core, got)
    assert core.stats().preemptions > 0
    assert all(got.tokens[r.request_id, 0] == expected(r) for r in made)


def test_urgent_requests_go_first_but_starve_nobody():
    core, got = engine(max_num_seqs=1, scheduling_policy="priority"), Collector()
    core.add(request("patient", [1] * 4, priority=3, max_tokens=4, ignore_eos=True))
    step = 0
    while ("patient", 0) not in got.reasons:
        core.add(request(f"urgent{step}", [2] * 4, priority=0, max_tokens=4, ignore_eos=True))
        for _ in range(5):
            got.take(core.step())
        step += 1
        assert step < 2000, "the patient request starves"
    assert step > 50  # and it did yield for a while


def test_blocks_of_ended_sequences_are_evicted_leaf_first():
    core, got = engine(num_blocks=16, max_model_len=128), Collector()
    core.add(request("a", [4] * 64, max_tokens=1))
    run(core, got)
    core.add(request("b", [9] * 70, max_tokens=1))  # needs 9 of 16 blocks: 8 are cached, 8 free → one is evicted
    run(core, got)
    core.add(request("c", [4] * 64, max_tokens=1))
    run(core, got)
    assert next(d for d in got.deltas if d.request_id == "c").num_cached_tokens == 56


def test_a_failed_step_ends_its_own_requests_only():
    from octavo.engine.errors import StepError

    core, got = engine(lag=0), Collector()
    core.add(request("bad", [3] * 20, max_tokens=30, ignore_eos=True))
    got.take(core.step())
    collect = core.process.collect

    def broken():
        collect()
        core.process.collect = collect
        raise StepError("boom")

    core.process.collect = broken
    got.take(core.step())
    assert got.reasons["bad", 0] == "error"
    made = request("good", [3] * 20, max_tokens=30, ignore_eos=True)
    core.add(made)
    run(core, got)
    assert got.tokens["good", 0] == expected(made)


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ([], {}, "empty"),
        ([1] * 128, {}, "128 tokens"),
        ([99], {}, "outside"),
        ([1], {"stop_token_ids": (40,)}, "stop_token_ids"),
        ([1], {"logprobs": 21}, "logprobs"),
    ],
)
def test_what_can_never_run_is_refused(prompt, params, words):
    core = engine()
    with pytest.raises(RequestError, match=words):
        core.add(request("r", prompt, **params))
    assert not core.has_work


def test_a_full_queue_and_a_used_id_are_refused():
    core = engine(max_num_queued_reqs=2)
    core.add(request("a", [1]))
    core.add(request("b", [1]))
    with pytest.raises(RequestError, match="in use"):
        core.add(request("a", [1]))
    with pytest.raises(CapacityError, match="full"):
        core.add(request("c", [1]))


def test_an_idle_engine_accepts_a_request_even_without_a_queue():
    core, got = engine(max_num_queued_reqs=0), Collector()
    core.add(request("a", [1], max_tokens=2, ignore_eos=True))
    run(core, got)
    assert got.reasons["a", 0] == "length"

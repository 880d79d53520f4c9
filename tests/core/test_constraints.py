"""Outputs of a form: what is allowed is drawn, what is forced needs no draw, and nothing depends on how steps fall.

Forms are small machines over the harness's 32 tokens; the definition of an output is a loop without a scheduler.
"""

import sys
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.engine.core.constraints import LEAST_JUMP
from octavo.engine.core.plan import TokenMasks
from octavo.engine.core.seeds import sequence_seed
from octavo.engine.errors import RequestError, StepError
from octavo.engine.grammar.spec import StructuredOutputs
from octavo.engine.params import SamplingParams
from octavo.engine.process.masks import MaskBox
from octavo.engine.runner.fake import mix
from octavo.engine.runner.fake_choice import choose
from octavo.engine.types import Request, Resumed

sys.path.insert(0, str(Path(__file__).parent))
from harness import EOS, VOCAB, Collector, check_invariants, engine, expected, run, small_vocab

ALL = b"\xff" * 4


class Machine:
    """A form over 32 tokens, drawn from a number: tokens move it from state to state. Some states allow a few tokens
    and perhaps the end, some force a run of tokens, one is the end.
    """

    def __init__(self, number: int, states: int = 9) -> None:
        state = number
        self.rules: list[tuple[str, tuple[int, ...]]] = []
        for _ in range(states):
            state = mix(state, 1)
            kind = ("choice", "choice", "end or choice", "run")[(state >> 9) % 4]
            size = 1 + (state >> 13) % 6
            self.rules.append((kind, tuple(1 + (mix(state, i) >> 8) % (VOCAB - 1) for i in range(size))))
        self.rules.append(("end", ()))

    def matcher(self) -> "Place":
        return Place(self)


class Place:
    def __init__(self, machine: Machine) -> None:
        self.machine, self.state, self.at, self.error = machine, 0, 0, None

    @property
    def rule(self):
        return self.machine.rules[self.state]

    @property
    def ended(self) -> bool:
        return self.rule[0] == "end"

    def forced(self):
        return self.rule[1][self.at :] if self.rule[0] == "run" else ()

    def mask(self) -> bytes:
        kind, tokens = self.rule
        allowed = set(self.forced()[:1] if kind == "run" else tokens) | ({EOS} if kind.startswith("end") else set())
        return sum(1 << token for token in allowed).to_bytes(4, "little")

    def take(self, token: int) -> None:
        if not self.mask()[token >> 3] >> (token & 7) & 1:
            self.error = f"{token} may not come in {self.rule}"
        kind, tokens = self.rule
        self.at += 1
        if token == EOS:
            self.state = len(self.machine.rules) - 1
        elif kind != "run" or self.at == len(tokens):
            self.state, self.at = self.state + 1, 0


class Free:
    """Allows everything."""

    error, ended = None, False

    def matcher(self):
        return self

    def forced(self):
        return ()

    def take(self, token: int) -> None:
        pass

    def mask(self) -> bytes:
        return ALL


class Forms:
    """Grammars by the number in a regex. Held back until `release`."""

    def __init__(self, held: bool = False) -> None:
        self.held, self.waiting = held, []

    def compile(self, spec: StructuredOutputs):
        future = Future()
        self.waiting.append((future, spec))
        if not self.held:
            self.release()
        return future

    def release(self) -> None:
        for future, spec in self.waiting:
            if spec.regex == "bad":
                future.set_exception(RequestError("It is no form.", "structured_outputs.regex"))
            else:
                future.set_result(Free() if spec.regex == "free" else Machine(int(spec.regex)))
        self.waiting.clear()

    def close(self) -> None:
        self.waiting.clear()


def constrained(forms=None, **options):
    core = engine(**options)
    core._forms._grammars = forms or Forms()
    return core


def form(name, after=()):
    return StructuredOutputs(regex=str(name), begins_after=after)


def definition(made: Request, index: int) -> list[int]:
    """The output, token by token."""
    params, spec = made.params, made.params.structured_outputs
    if spec is None or spec.regex == "free":
        return expected(made, index)
    place, awake, out = Machine(int(spec.regex)).matcher(), not spec.begins_after, []
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else {EOS})
    seed = sequence_seed(params.seed or 0, index)
    limit = min(128 - len(made.prompt_token_ids), params.max_tokens or 128)
    state = 0
    for token in made.prompt_token_ids:
        state = mix(state, token)
    while len(out) < limit and not (awake and place.ended):
        key = state if params.greedy else mix(state, seed)
        never = stops if len(out) < params.min_tokens else ()
        token = small_vocab(key)
        while token in never:
            key = mix(key, token)
            token = small_vocab(key)
        if awake and place.forced():
            token = place.forced()[0]
        elif awake:
            token = choose(key, place.mask(), token, len(out), tuple(sorted(stops)), never)
        out.append(token)
        state = mix(state, token)
        if awake:
            place.take(token)
            assert place.error is None
        else:
            awake = tuple(out[-len(spec.begins_after) :]) == spec.begins_after
        if token in stops and len(out) >= params.min_tokens:
            break
    return out


requests = st.fixed_dictionaries(
    {
        "prompt": st.lists(st.integers(1, 31), min_size=1, max_size=40),
        "max_tokens": st.one_of(st.none(), st.integers(1, 40)),
        "temperature": st.sampled_from([0.0, 1.0]),
        "ignore_eos": st.booleans(),
        "n": st.sampled_from([1, 1, 3]),
        "seed": st.integers(0, 3),
        "logprobs": st.sampled_from([None, None, 2]),
        "presence_penalty": st.sampled_from([0.0, 0.0, 0.5]),
        "stop_token_ids": st.sampled_from([(), (), (9,)]),
        "structured_outputs": st.one_of(
            st.none(),
            st.just(form("free")),
            st.integers(0, 40).map(form),
            st.builds(form, st.integers(0, 40), st.sampled_from([(5,), (3,)])),
        ),
    }
)
configs = st.fixed_dictionaries(
    {
        "num_blocks": st.sampled_from([16, 17, 40, 64]),
        "caching": st.booleans(),
        "lag": st.integers(0, 2),
        "stages": st.sampled_from([1, 1, 1, 2, 3]),
        "max_num_seqs": st.integers(1, 8),
        "max_num_batched_tokens": st.sampled_from([8, 9, 32, 200]),
    }
)


def made_of(number: int, options) -> Request:
    options = dict(options)
    if options["temperature"] == 0:
        options["n"] = 1
    return Request(f"r{number}", tuple(options.pop("prompt")), SamplingParams(**options))


def finish(core, *requests):
    got = Collector()
    for made in requests:
        got.take(core.add(made))
    run(core, got)
    stats = core.stats()
    assert (stats.num_running, stats.num_waiting, stats.waiting_tokens, stats.kv_blocks_held) == (0, 0, 0, 0)
    return got


@settings(max_examples=150, deadline=None)
@given(st.lists(requests, min_size=1, max_size=5), configs)
def test_every_output_is_its_definition_whatever_is_in_the_batch(batch, config):
    made = [made_of(number, options) for number, options in enumerate(batch)]
    got = finish(constrained(**config), *made)
    for one in made:
        for index in range(one.params.n):
            assert got.tokens.get((one.request_id, index), []) == definition(one, index)
    assert "error" not in got.reasons.values()


@settings(max_examples=100, deadline=None)
@given(requests, configs, configs, st.integers(0, 200), st.integers(0, 30))
def test_cut_anywhere_and_resumed_it_is_the_undisturbed_run(options, first, second, cut, inside):
    made = made_of(0, options)
    whole = finish(constrained(**first), made)
    before = whole.deltas[: cut % (len(whole.deltas) + 1)]
    ended = {d.index for d in before if d.finish_reason}
    left = [i for i in range(made.params.n) if i not in ended]
    if not left:
        return
    tokens = {i: [t for d in before if d.index == i for t in d.token_ids] for i in left}
    if made.params.logprobs is None:  # also in the middle of what came at once
        tokens[left[0]] += whole.tokens["r0", left[0]][len(tokens[left[0]]) :][:inside]
    rest = replace(made, resume=tuple(Resumed(i, tuple(tokens[i])) for i in left))
    after = finish(constrained(**second), rest)
    for index in left:
        assert tokens[index] + after.tokens["r0", index] == definition(made, index)
        assert after.reasons["r0", index] == whole.reasons["r0", index]


@settings(max_examples=60, deadline=None)
@given(st.lists(requests, min_size=2, max_size=5), configs, st.lists(st.integers(0, 30), min_size=5, max_size=5))
def test_aborts_at_any_time_leave_the_others_alone(batch, config, when):
    made = [made_of(number, options) for number, options in enumerate(batch)]
    core, got = constrained(**config), Collector()
    for one in made:
        got.take(core.add(one))
    gone = [one for number, one in enumerate(made) if number % 2]
    for step in range(31):
        for one in gone:
            if when[made.index(one)] == step:
                got.take(core.abort(one.request_id))
                check_invariants(core)
        if core.has_work:
            got.take(core.step())
            check_invariants(core)
    run(core, got)
    for one in made:
        for index in range(one.params.n):
            tokens, wanted = got.tokens.get((one.request_id, index), []), definition(one, index)
            assert tokens == wanted[: len(tokens)]
            assert one in gone or tokens == wanted
    assert core.stats().kv_blocks_held == 0


def test_forced_tokens_come_at_once_and_take_one_step():
    candidates = (
        Request("r", (1, 2, 3), SamplingParams(max_tokens=None, seed=1, structured_outputs=form(number)))
        for number in range(1000)
        if any(kind == "run" and len(tokens) == 6 for kind, tokens in Machine(number).rules)
    )
    made = next(made for made in candidates if EOS not in definition(made, 0))
    core = constrained()
    plans, launch = [], core.process.launch
    core.process.launch = lambda plan: (plans.append(plan), launch(plan))
    got = finish(core, made)
    length = len(got.tokens["r", 0])
    assert max(len(delta.token_ids) for delta in got.deltas) >= LEAST_JUMP
    assert len(plans) < length
    slow = finish(constrained(), replace(made, params=made.params.replace(logprobs=0)))
    assert max(len(delta.token_ids) for delta in slow.deltas) == 1
    assert slow.tokens == got.tokens
    ends = [d for d in got.deltas if d.finish_reason]
    assert [(d.finish_reason, d.form_complete) for d in ends] == [("stop", True)]


@pytest.mark.parametrize("held", [False, True])
def test_a_form_that_cannot_be_used_ends_its_request_alone(held):
    forms = Forms(held)
    core, got = constrained(forms), Collector()
    core.add(Request("good", (1,), SamplingParams(max_tokens=5, seed=1)))
    bad = Request("bad", (1,), SamplingParams(n=2, seed=1, structured_outputs=form("bad")))
    if not held:
        with pytest.raises(RequestError) as caught:
            core.add(bad)
        assert caught.value.param == "structured_outputs.regex"
    else:
        core.add(bad)
        forms.release()
    run(core, got)
    assert got.reasons.pop(("good", 0)) in ("length", "stop")
    assert set(got.reasons.values()) == ({"error"} if held else set())
    errors = [d for d in got.deltas if d.error]
    assert {(d.error, d.error_param) for d in errors} == (
        {("It is no form.", "structured_outputs.regex")} if held else set()
    )


def test_a_request_that_waits_for_its_form_is_in_nobodys_way_and_can_be_aborted():
    forms = Forms(held=True)
    core, got = constrained(forms, max_num_queued_reqs=4), Collector()
    for name in ("gone", "stays"):
        core.add(Request(name, (1, 2), SamplingParams(n=2, max_tokens=4, seed=1, structured_outputs=form("3"))))
    assert core.stats().num_waiting == 4
    with pytest.raises(RequestError, match="in use"):
        core.check_request(Request("stays", (1,), SamplingParams()))
    got.take(core.abort("gone"))
    assert [got.reasons["gone", i] for i in range(2)] == ["abort"] * 2
    core.add(Request("plain", (1, 2), SamplingParams(max_tokens=4, seed=1, ignore_eos=True)))
    for _ in range(20):
        got.take(core.step())
    assert got.reasons["plain", 0] == "length"
    assert ("stays", 0) not in got.reasons
    forms.release()
    run(core, got)
    assert {got.reasons["stays", i] for i in range(2)} <= {"length", "stop"}
    assert core.stats().kv_blocks_held == core.stats().num_waiting == 0


def test_a_token_that_the_form_does_not_allow_ends_the_resumed_sequence_with_an_error():
    made = Request("r", (1,), SamplingParams(max_tokens=20, structured_outputs=form(3)))
    wrong = next(t for t in range(1, VOCAB) if not Machine(3).matcher().mask()[t >> 3] >> (t & 7) & 1)
    got = finish(constrained(), replace(made, resume=(Resumed(0, (wrong,)),)))
    assert got.reasons == {("r", 0): "error"}
    assert got.deltas[0].error_param == "structured_outputs"


def test_masks_of_a_failed_step_are_passed_over_and_nobody_waits_for_ever():
    box = MaskBox()
    for step in (3, 4):
        box.put(TokenMasks(step, (b"",)))
    assert box.take(4).step_id == 4
    box.close()
    for _ in range(2):
        with pytest.raises(StepError):
            box.take(5)

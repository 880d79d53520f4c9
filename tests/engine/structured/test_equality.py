"""Masks change what they must and nothing else: on a model, in any layout of ranks, with any lag."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from launchers import Threads

from octavo.engine.build import Phases, assemble, build_engine
from octavo.engine.config import EngineConfig
from octavo.engine.grammar.compiler import compile_form
from octavo.engine.grammar.spec import StructuredOutputs
from octavo.engine.grammar.tokens import grammar_tokenizer
from octavo.engine.parallel.layout import Layout
from octavo.engine.params import SamplingParams
from octavo.engine.process.ranks import Deadlines, Ranks
from octavo.engine.text.byte_tokenizer import ByteTokenizer
from octavo.engine.types import Request, Resumed

OPTIONS = {
    "load_format": "dummy",
    "dtype": "float32",
    "block_size": 8,
    "max_model_len": 400,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "num_gpu_blocks_override": 51,
}
SCHEMA = {
    "type": "object",
    "properties": {
        "identification": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["walking", "reading", "threading"]},
        "counts": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 20}, "maxItems": 3},
    },
    "required": ["identification", "kind", "counts"],
    "additionalProperties": False,
}
TIGHT = StructuredOutputs(json=SCHEMA, disable_any_whitespace=True)
FORMS = [None, TIGHT, StructuredOutputs(json=SCHEMA), StructuredOutputs(regex="(ab|ba){3,20}x+"), None]


def workload() -> list[Request]:
    """Rows with and without a form, drawn in every way."""
    params = [
        SamplingParams(seed=seed, max_tokens=120, structured_outputs=form, **more)
        for seed, more in enumerate(
            [
                {},
                {"temperature": 0},
                {"top_k": 5},
                {"presence_penalty": 0.5},
                {"logprobs": 2},
                {"n": 2},
                {"min_tokens": 40},
            ]
        )
        for form in FORMS[seed % 2 :: 2]
    ]
    return [Request(f"r{i}", tuple(range(4, 12 + 5 * (i % 7))), p) for i, p in enumerate(params)]


def start(folder, tp=1, pp=1, **more):
    config = EngineConfig(str(folder), tensor_parallel_size=tp, pipeline_parallel_size=pp, **(OPTIONS | more))
    if tp * pp == 1:
        return build_engine(config).core
    ranks = Ranks(config, Layout(tp, pp), Threads(), Deadlines(hang_s=60), Phases(None))
    return assemble(config, ranks.info, ranks).core


def answers(core, requests):
    """(tokens, finish reason) of every sequence."""
    core.prepare(requests)
    deltas = [delta for request in requests for delta in core.add(request)]
    while core.has_work:
        deltas += core.step()
        core.scheduler.pool.check()
    assert [d.error for d in deltas if d.error] == []
    assert core.stats().kv_blocks_held == 0
    keys = [(request.request_id, wanted.index) for request in requests for wanted in request.sequences]
    mine = {key: [d for d in deltas if (d.request_id, d.index) == key] for key in keys}
    return {key: ([t for d in ds for t in d.token_ids], ds[-1].finish_reason) for key, ds in mine.items()}


@pytest.fixture(scope="module")
def alone(random_model):
    """Each request by itself, nothing overlapping."""
    core = start(random_model, async_scheduling=False)
    found = {}
    for request in workload():
        found |= answers(core, [request])
    core.close()
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"async_scheduling": False},
        {"tp": 2},
        {"pp": 2},
        {"kernels": "ref"},
        {"enable_prefix_caching": False},
    ],
    ids=str,
)
def test_a_batch_in_any_layout_gives_what_each_request_gives_alone(random_model, alone, options):
    core = start(random_model, **options)
    got = answers(core, workload())
    stats = core.stats()
    core.close()
    assert got == alone
    assert stats.preemptions > 0


def test_a_form_that_allows_everything_changes_nothing(random_model):
    ascii_tokens = tuple(range(4, 98))
    plain = [
        Request(f"{i}", (5, 6, 7), SamplingParams(seed=i, max_tokens=60, allowed_token_ids=ascii_tokens, **more))
        for i, more in enumerate([{}, {"temperature": 0}, {"top_p": 0.7}, {"logprobs": 1}, {"repetition_penalty": 1.2}])
    ]
    free = StructuredOutputs(regex="(?s:.*)")
    formed = [Request(r.request_id, r.prompt_token_ids, r.params.replace(structured_outputs=free)) for r in plain]
    core = start(random_model)
    assert answers(core, plain) == answers(core, formed)
    core.close()


def test_it_goes_on_elsewhere_from_any_token(random_model, alone):
    requests = {r.request_id: r for r in workload()}
    core = start(random_model)
    cut = [
        Request(
            f"{name}-{at}",
            request.prompt_token_ids,
            request.params,
            resume=(Resumed(0, tuple(alone[name, 0][0][:at])),),
        )
        for name, request in requests.items()
        if request.params.structured_outputs == TIGHT and request.params.n == 1
        for at in range(0, len(alone[name, 0][0]), 3)
    ]
    for (name, _), (tokens, reason) in answers(core, cut).items():
        whole, at = name.split("-")
        assert (alone[whole, 0][0][: int(at)] + tokens, reason) == alone[whole, 0]
    core.close()


@pytest.mark.parametrize(("begins_after", "gap"), [((), ""), ((9,), ""), ((9,), "\n\n")])
@pytest.mark.parametrize("spec", [StructuredOutputs(json=True), StructuredOutputs(json={"type": "array"})])
def test_json_behind_a_thought_may_leave_a_line_or_two(spec, begins_after, gap):
    tokenizer = ByteTokenizer()
    for_grammars = grammar_tokenizer(tokenizer, tokenizer.vocab_size, tuple(tokenizer.eos_token_ids))
    matcher = compile_form(spec.replace(begins_after=begins_after), for_grammars)
    text = f"{gap}[1, 2]".encode()
    assert matcher.try_consume_tokens(list(text)) == len(text)
    assert matcher.is_accepting()
    beginning = compile_form(spec.replace(begins_after=begins_after), for_grammars)
    assert (beginning.try_consume_tokens(list(b"\n[")) == 2) is bool(begins_after)


def test_the_form_begins_after_what_it_waits_for(random_model):
    core = start(random_model)
    think = 3  # </think>
    spec = TIGHT.replace(begins_after=(think,))
    params = SamplingParams(seed=5, max_tokens=300, structured_outputs=spec, logit_bias={think: 4.0}, ignore_eos=True)
    request = Request("r", (5, 6), params)
    plain = Request("p", (5, 6), params.replace(structured_outputs=None))
    got = answers(core, [request, plain])
    tokens, reason = got["r", 0]
    at = tokens.index(think)
    assert at > 0
    assert tokens[: at + 1] == got["p", 0][0][: at + 1]
    from octavo.engine.text.tokenizer import load_tokenizer

    value = json.loads(load_tokenizer(random_model).decode(tokens[at + 1 :]))
    assert value["kind"] in SCHEMA["properties"]["kind"]["enum"]
    assert reason == "stop"
    core.close()

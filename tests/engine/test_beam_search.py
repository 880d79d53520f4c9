"""Beam search over whole models against transformers' generate(num_beams=…), and LLM.beam_search."""

import importlib.util
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))
from launchers import Threads

from octavo.engine import LLM, BeamSearchParams
from octavo.engine.beam import Beams
from octavo.engine.build import Phases, assemble, build_engine
from octavo.engine.config import EngineConfig
from octavo.engine.errors import RequestError
from octavo.engine.parallel.layout import Layout
from octavo.engine.params import SamplingParams
from octavo.engine.process.ranks import Deadlines, Ranks
from octavo.engine.types import Request

_spec = importlib.util.spec_from_file_location("tiny", Path(__file__).parents[1] / "models" / "tiny.py")
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

PROMPTS = tiny.prompts((5, 23, 1, 40))
NEW = 20
ENDS = (7, 60)  # tokens that the tests take for end tokens


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tiny.make("llama", tmp_path_factory.mktemp("checkpoints"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return folder, model


def reference(model, prompt, width, ends, **options):
    """(tokens, score) of every beam, as transformers finds them."""
    ids = torch.tensor([prompt])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), num_beams=width, num_return_sequences=width, do_sample=False,
            max_new_tokens=NEW, eos_token_id=list(ends) or None, pad_token_id=191, return_dict_in_generate=True,
            output_scores=True, **options,
        )  # fmt: skip
    beams = []
    for row, score in zip(found.sequences[:, len(prompt) :].tolist(), found.sequences_scores.tolist(), strict=True):
        end = next((at + 1 for at, token in enumerate(row) if token in ends), len(row))
        beams.append((row[:end], score))
    return beams


def start(folder, **options):
    settings = {"dtype": "float32", "block_size": 8, "max_model_len": 64, "max_num_seqs": 32,
                "num_gpu_blocks_override": 300}  # fmt: skip
    return build_engine(EngineConfig(model=str(folder), **settings | options)).core


def search(core, prompts, beams, **params):
    wanted = SamplingParams(n=beams.width, beams=beams, max_tokens=NEW, logprobs=2, **params)
    for number, prompt in enumerate(prompts):
        core.add(Request(f"r{number}", tuple(prompt), wanted))
    deltas = {}
    while core.has_work:
        for delta in core.step():
            assert delta.error is None, delta.error
            deltas[delta.request_id, delta.index] = delta
        core.scheduler.pool.check()
    assert core.stats().kv_blocks_held == 0
    return [[deltas[f"r{number}", i] for i in range(beams.width)] for number in range(len(prompts))]


SEARCHES = [
    (1, 1.0, False, ENDS), (2, 1.0, False, ENDS), (4, 1.0, False, ENDS), (4, 0.0, "never", ENDS),
    (4, 2.0, "never", ENDS), (3, 0.5, True, ENDS), (4, -1.0, False, ENDS[:1]), (5, 1.0, False, ()),
]  # fmt: skip
CONDITIONS = [{"max_num_seqs": 3}, {"num_gpu_blocks_override": 14}, {"enable_prefix_caching": False},
              {"max_num_batched_tokens": 32}]  # fmt: skip


@pytest.mark.parametrize(
    ("condition", "search_for"),
    [*(({}, one) for one in SEARCHES), *((condition, SEARCHES[2]) for condition in CONDITIONS)],
    ids=str,
)
def test_beams_equal_transformers(llama, condition, search_for):
    width, penalty, early, ends = search_for
    folder, model = llama
    core = start(folder, **condition)
    try:
        found = search(core, PROMPTS, Beams(width, penalty, early), stop_token_ids=ends, ignore_eos=True)
    finally:
        core.close()
    for prompt, deltas in zip(PROMPTS, found, strict=True):
        if width == 1:  # transformers searches greedily then
            greedy = tiny.reference_greedy(model, [prompt], NEW)[0]
            end = next((at + 1 for at, token in enumerate(greedy) if token in ends), NEW)
            assert list(deltas[0].token_ids) == greedy[:end]
            continue
        want = reference(model, prompt, width, ends, length_penalty=penalty, early_stopping=early)
        assert [list(delta.token_ids) for delta in deltas] == [tokens for tokens, _ in want]
        for delta, (tokens, score) in zip(deltas, want, strict=True):
            total = sum(entry.logprobs[0] for entry in delta.logprobs)
            assert total / len(tokens) ** penalty == pytest.approx(score, rel=1e-4)
            stopped = tokens[-1] in ends
            assert (delta.finish_reason, delta.stop_reason) == (("stop", tokens[-1]) if stopped else ("length", None))
            assert [entry.token_ids[0] for entry in delta.logprobs] == tokens
            assert all(len(entry.token_ids) == 3 for entry in delta.logprobs)


@pytest.mark.parametrize("layout", [(2, 1), (1, 2)], ids=["tp2", "pp2"])
def test_several_ranks_find_what_one_finds(llama, layout):
    folder, model = llama
    config = EngineConfig(
        str(folder), dtype="float32", block_size=8, max_model_len=64, max_num_seqs=6, num_gpu_blocks_override=40,
        tensor_parallel_size=layout[0], pipeline_parallel_size=layout[1],
    )  # fmt: skip
    ranks = Ranks(config, Layout(*layout), Threads(), Deadlines(hang_s=60), Phases(None))
    core = assemble(config, ranks.info, ranks).core
    try:
        found = search(core, PROMPTS, Beams(4), stop_token_ids=ENDS, ignore_eos=True)
    finally:
        core.close()
    for prompt, deltas in zip(PROMPTS, found, strict=True):
        want = reference(model, prompt, 4, ENDS)
        assert [list(delta.token_ids) for delta in deltas] == [tokens for tokens, _ in want]


def test_min_tokens_as_in_transformers(llama):
    folder, model = llama
    core = start(folder)
    try:
        found = search(core, PROMPTS, Beams(4), stop_token_ids=ENDS, ignore_eos=True, min_tokens=6)
    finally:
        core.close()
    for prompt, deltas in zip(PROMPTS, found, strict=True):
        want = reference(model, prompt, 4, ENDS, min_new_tokens=6)
        assert [list(delta.token_ids) for delta in deltas] == [tokens for tokens, _ in want]


def test_the_library_speaks_vllms_shapes():
    with pytest.raises(RequestError, match="beam width"):
        BeamSearchParams(0, 5).sampling_params()
    llm = LLM("fake:step_ms=0")
    try:
        found, again = llm.beam_search(["Once", [1, 2, 3]], BeamSearchParams(beam_width=3, max_tokens=6))
        (alone,) = llm.beam_search("Once", BeamSearchParams(3, 6, temperature=0.9, length_penalty=2.0))
    finally:
        llm.close()
    assert len(found.sequences) == len(again.sequences) == 3
    best = found.sequences[0]
    prompt = llm.get_tokenizer().encode("Once")
    assert best.tokens[: len(prompt)] == list(prompt)
    assert best.text.startswith("Once")
    assert best.text == llm.get_tokenizer().decode(best.tokens)
    assert best.cum_logprob == pytest.approx(
        sum(entry[token].logprob for entry, token in zip(best.logprobs, best.tokens[len(prompt) :], strict=True))
    )
    scores = [beam.cum_logprob / len(beam.logprobs) for beam in found.sequences]
    assert scores == sorted(scores, reverse=True)
    assert [beam.finish_reason for beam in found.sequences] == ["length"] * 3
    assert len(alone.sequences) == 3

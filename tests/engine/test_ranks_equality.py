"""Several ranks give the tokens of one: tensor and pipeline parallel, whole engine, ranks as threads of this process.

Every layout sees a mixed batch in chunks, preemption in a pool that is too small, and prefix hits, over the channel of
processes. Checkpoints are tests/models/tiny.py's.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from launchers import Threads

from octavo.engine.build import Phases, assemble, build_engine
from octavo.engine.config import EngineConfig
from octavo.engine.core.engine import EngineCore
from octavo.engine.errors import ConfigError
from octavo.engine.parallel.layout import Layout
from octavo.engine.params import SamplingParams
from octavo.engine.process.ranks import Deadlines, Ranks
from octavo.engine.types import Request

_spec = importlib.util.spec_from_file_location("tiny", Path(__file__).parents[1] / "models" / "tiny.py")
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
PARAMS = (
    GREEDY,
    GREEDY.replace(prompt_logprobs=2),
    GREEDY.replace(repetition_penalty=1.3, presence_penalty=0.5),
    GREEDY.replace(max_tokens=7, logprobs=3),
    GREEDY.replace(min_tokens=6, stop_token_ids=tuple(range(0, 192, 7)), bad_words=()),
    GREEDY.replace(max_tokens=33),
)
PROMPTS = tiny.prompts((5, 23, 1, 40, 33, 12))
LAYOUTS = {"tp2": (2, 1), "pp2": (1, 2), "tp2 pp2": (2, 2), "tp3": (3, 1), "pp3": (1, 3)}
OPTIONS = {
    "dtype": "float32",
    "block_size": 8,
    "max_model_len": 80,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 24,
    "num_gpu_blocks_override": 15,
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread_each():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config_of(folder: Path, quantization: str, **options: int) -> EngineConfig:
    return EngineConfig(str(folder), quantization=quantization, **OPTIONS, **options)


def start(config: EngineConfig) -> EngineCore:
    """An engine of ranks that are threads."""
    layout = Layout(config.tensor_parallel_size, config.pipeline_parallel_size)
    ranks = Ranks(config, layout, Threads(), Deadlines(hang_s=60), Phases(None))
    return assemble(config, ranks.info, ranks).core


def answers(core: EngineCore, tag: str, which: range = range(6)) -> tuple[list[list[int]], list[float]]:
    """(tokens of each request, every log probability that was asked for)."""
    tokens: dict[str, list[int]] = {}
    logprobs: dict[str, list[float]] = {}
    for i in which:
        core.add(Request(f"{tag}{i}", tuple(PROMPTS[i]), PARAMS[i]))
        tokens[f"{tag}{i}"], logprobs[f"{tag}{i}"] = [], []
    while core.has_work:
        for delta in core.step():
            assert delta.error is None, delta.error
            tokens[delta.request_id] += delta.token_ids
            for entry in (*delta.logprobs, *(delta.prompt_logprobs or ())):
                logprobs[delta.request_id] += entry.logprobs if entry else ()
        core.scheduler.pool.check()
    return list(tokens.values()), [value for values in logprobs.values() for value in values]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one rank answers, by (family, quantization)."""
    known = {}

    def of(name: str, quantization: str) -> tuple[Path, tuple[list[list[int]], list[float]]]:
        if (name, quantization) not in known:
            folder = tiny.make(name, tmp_path_factory.mktemp("checkpoints"))
            core = build_engine(config_of(folder, quantization)).core
            known[name, quantization] = folder, answers(core, "")
            core.close()
        return known[name, quantization]

    return of


CASES = [
    *(("llama", layout, "none") for layout in LAYOUTS),
    ("qwen3", "tp2 pp2", "none"),
    ("qwen3", "tp3", "none"),
    ("gemma3", "tp2 pp2", "none"),
    ("gemma3", "pp2", "none"),
    ("llama-one-kv-head", "tp2", "none"),
    ("gpt2", "tp2 pp2", "none"),
    ("llama", "tp2 pp2", "int8"),
    ("llama", "tp3", "int8"),
    ("llama", "pp3", "int8"),
    ("qwen3", "tp2", "int8"),
    ("gemma3", "tp2", "int8"),
]


@pytest.mark.parametrize(("family", "layout", "quantization"), CASES, ids=lambda value: str(value).replace(" ", "-"))
def test_the_same_tokens_as_one_rank(alone, family, layout, quantization):
    folder, (expected, logprobs) = alone(family, quantization)
    tp, pp = LAYOUTS[layout]
    sizes = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp}
    core = start(config_of(folder, quantization, **sizes))
    try:
        tokens, found = answers(core, "a")
        assert tokens == expected
        assert found == pytest.approx(logprobs, abs=2e-4) if quantization == "none" and tp > 1 else found == logprobs
        assert core.stats().preemptions > 0
        for tag in "bc":
            assert answers(core, tag, range(2, 4))[0] == expected[2:4]
        assert core.stats().prefix_hits >= 32
    finally:
        core.close()


@pytest.mark.parametrize("layout", ["tp3", "tp2 pp2"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_batch_invariance_is_over_layouts_too(alone, family, layout):
    folder, (_, logprobs) = alone(family, "none")
    tp, pp = LAYOUTS[layout]
    sizes = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp, "batch_invariant": True}
    core = start(config_of(folder, "none", **sizes))
    try:
        assert answers(core, "a")[1] == logprobs
    finally:
        core.close()


def test_a_layout_that_the_model_cannot_have_is_one_sentence_said_once(alone):
    folder, _ = alone("llama", "none")
    with pytest.raises(ConfigError) as caught:
        start(EngineConfig(str(folder), pipeline_parallel_size=5, **OPTIONS))
    assert "5" in str(caught.value)
    assert str(caught.value).count("pipeline") == 1


def test_ranks_agree_on_the_blocks_that_fit_everywhere(alone):
    """Of three layers dealt to two stages the last has one, and room for twice the blocks: the other decides."""
    folder, _ = alone("llama", "none")
    options = OPTIONS | {"num_gpu_blocks_override": None, "kv_cache_memory_bytes": 1 << 17, "max_model_len": None}
    core = start(EngineConfig(str(folder), pipeline_parallel_size=2, **options))
    try:
        of_two_layers = (1 << 17) // (8 * 2 * 2 * (2 * 8) * 4)
        assert core.scheduler.pool.total == of_two_layers
    finally:
        core.close()

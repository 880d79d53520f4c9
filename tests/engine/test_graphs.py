"""Graphs of small steps: the same bits with and without, and used where they are meant to be."""

import importlib.util
import time
from pathlib import Path

import pytest

from octavo.engine.build import build_engine
from octavo.engine.config import EngineConfig
from octavo.engine.core.engine import EngineCore
from octavo.engine.params import SamplingParams
from octavo.engine.runner import graph
from octavo.engine.types import Request

_spec = importlib.util.spec_from_file_location("tiny", Path(__file__).parents[1] / "models" / "tiny.py")
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

LENGTHS = (3, 9, 9, 14, 20)  # of the answers
RECORDED = ("llama", "llama-bias", "mistral", "qwen2", "qwen3", "phi3")


def start(folder: Path, **options: object) -> EngineCore:
    settings = {"dtype": "float32", "max_model_len": 64, "max_num_seqs": 8, "num_gpu_blocks_override": 64}
    settings |= {"enable_prefix_caching": False, "async_scheduling": False}
    return build_engine(EngineConfig(model=str(folder), **settings | options)).core


def answers(core: EngineCore) -> dict[str, list[object]]:
    """Per request: tokens with the log probabilities of the likeliest."""
    found: dict[str, list[object]] = {}
    for i, (prompt, length) in enumerate(zip(tiny.prompts((5, 23, 1, 17, 12)), LENGTHS, strict=True)):
        params = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, logprobs=2)
        core.add(Request(str(i), tuple(prompt), params))
        found[str(i)] = []
    while core.has_work:
        for delta in core.step():
            assert delta.error is None, delta.error
            found[delta.request_id] += zip(delta.token_ids, delta.logprobs, strict=True)
    return found


def recorded(core: EngineCore) -> set[tuple[int, int]]:
    """Shapes of steps, (tokens, rows)."""
    return set(core.process._runner.forward._graphs)


@pytest.mark.parametrize("name", [*RECORDED, "gemma2", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"quantization": "int8", "kv_cache_dtype": "int8"}], ids=["floats", "int8"])
def test_a_graph_gives_the_same_bits(name, options, tmp_path, monkeypatch):
    folder = tiny.make(name, tmp_path)
    with_graphs = start(folder, **options)
    found = answers(with_graphs)
    assert answers(with_graphs) == found
    shapes = {(1, 1), (2, 2), (4, 4), (5, 5), (sum((5, 23, 1, 17, 12)), 5)}  # the prompts came twice
    assert recorded(with_graphs) == (shapes if name in RECORDED else set())
    monkeypatch.setattr(graph, "MAX_TOKENS", 0)
    without = start(folder, **options)
    assert answers(without) == found
    assert recorded(without) == set()


def test_threads_rest_while_the_engine_waits(tmp_path):
    """Whatever computed the last step: a waiting engine leaves the cores to others."""
    answers(start(tiny.make("llama", tmp_path)))
    time.sleep(0.2)  # threads may spin for a moment after a step
    begin = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - begin < 0.05

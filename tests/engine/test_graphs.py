"""Graphs of decode steps: the same bits with and without, and used where they are meant to be."""

import importlib.util
import time
from pathlib import Path

import pytest

from octavo.engine import LLM, SamplingParams
from octavo.engine.runner import graph

_spec = importlib.util.spec_from_file_location("tiny", Path(__file__).parents[1] / "models" / "tiny.py")
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

PARAMS = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, logprobs=2) for n in (3, 9, 9, 14, 20)]
RECORDED = ("llama", "llama-bias", "mistral", "qwen2", "qwen3", "phi3")


def start(folder: Path, **options: object) -> LLM:
    settings = {"dtype": "float32", "max_model_len": 64, "max_num_seqs": 8, "num_gpu_blocks_override": 64}
    return LLM(str(folder), **settings | options)


def answers(llm: LLM) -> list[object]:
    prompts = tiny.prompts((5, 23, 1, 17, 12))
    return [output.outputs[0] for output in llm.generate(prompts, PARAMS, use_tqdm=False)]


def recorded(llm: LLM) -> set[int]:
    return set(llm._engine.core.process._runner.forward._graphs)


@pytest.mark.parametrize("name", [*RECORDED, "gemma2", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"quantization": "int8", "kv_cache_dtype": "int8"}], ids=["floats", "int8"])
def test_a_graph_gives_the_same_bits(name, options, tmp_path, monkeypatch):
    folder = tiny.make(name, tmp_path)
    with_graphs = start(folder, **options)
    found = answers(with_graphs)
    assert answers(with_graphs) == found
    assert recorded(with_graphs) == ({1, 2, 4, 5} if name in RECORDED else set())
    monkeypatch.setattr(graph, "MAX_ROWS", 0)
    without = start(folder, **options)
    assert answers(without) == found
    assert recorded(without) == set()


def test_threads_rest_while_the_engine_waits(tmp_path):
    """Whatever computed the last step: a waiting engine leaves the cores to others."""
    llm = start(tiny.make("llama", tmp_path))
    answers(llm)
    time.sleep(0.2)  # threads may spin for a moment after a step
    begin = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - begin < 0.05

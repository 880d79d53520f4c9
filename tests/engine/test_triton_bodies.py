"""The engine with the Triton bodies of its ops, in Triton's interpreter, against the engine with `ref`: same tokens."""

import importlib.util
from pathlib import Path

import pytest

from octavo.engine.build import build_engine
from octavo.engine.config import EngineConfig
from octavo.engine.params import SamplingParams
from octavo.engine.types import Request

_spec = importlib.util.spec_from_file_location("tiny", Path(__file__).parents[1] / "models" / "tiny.py")
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

GREEDY = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
DRAWN = SamplingParams(temperature=0.8, top_k=20, top_p=0.9, seed=3, logprobs=2, max_tokens=3, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make("llama", tmp_path_factory.mktemp("checkpoint"))


def tokens_with(kernels: str, folder: Path, quantization: str) -> list[list[int]]:
    """Of a greedy request and one that draws, both in one batch, in chunks."""
    core = build_engine(
        EngineConfig(
            model=str(folder),
            dtype="float32",
            kernels=kernels,
            quantization=quantization,
            block_size=8,
            max_model_len=64,
            max_num_batched_tokens=16,
            max_num_seqs=8,
            num_gpu_blocks_override=20,
        )
    ).core
    got: dict[str, list[int]] = {}
    for name, prompt, params in zip(("greedy", "drawn"), tiny.prompts((5, 14)), (GREEDY, DRAWN), strict=True):
        core.add(Request(name, tuple(prompt), params))
        got[name] = []
    while core.has_work:
        for delta in core.step():
            assert delta.error is None, delta.error
            got[delta.request_id].extend(delta.token_ids)
    return list(got.values())


@pytest.mark.parametrize("quantization", ["auto", "int8"])
def test_tokens_are_those_of_the_definition(folder: Path, quantization: str) -> None:
    assert tokens_with("triton", folder, quantization) == tokens_with("ref", folder, quantization)

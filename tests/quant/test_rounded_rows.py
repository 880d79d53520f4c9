"""Rows that reach a product rounded, from the norm or activation before it, against rows that it rounds itself: the
same tokens with the same log probabilities, in the whole engine with the Triton bodies (in Triton's interpreter).
"""

import sys
from pathlib import Path

import pytest
import torch

from octavo.engine.build import build_engine
from octavo.engine.config import EngineConfig
from octavo.engine.params import SamplingParams
from octavo.engine.types import Request
from octavo.kernels import triton
from octavo.kernels.rounded import Rounded, Rounding

sys.path.insert(0, str(Path(__file__).parent))
import builders
import tiny

BLOCKS = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
PARAMS = SamplingParams(temperature=0.0, max_tokens=2, logprobs=3, ignore_eos=True)
Found = list[tuple[tuple[int, ...], tuple[float, ...]]]


def write(kind: str, folder: Path) -> Path:
    source = builders.write_float("llama", folder / "float", **(BLOCKS if kind == "fp8" else {}))
    if kind == "fp8":
        builders.write_fp8(source, folder / kind, block=(128, 128))
    else:
        builders.write_compressed_tensors(source, folder / kind, kind)
    return folder / kind


def found(path: Path) -> Found:
    """Of two requests beside one another."""
    config = EngineConfig(
        model=str(path),
        dtype="float16",
        kernels="triton",
        block_size=16,
        max_model_len=64,
        max_num_batched_tokens=16,
        max_num_seqs=4,
        num_gpu_blocks_override=16,
    )
    core = build_engine(config).core
    got: dict[str, Found] = {"0": [], "1": []}
    try:
        for name, prompt in zip(got, tiny.prompts((4, 7)), strict=True):
            core.add(Request(name, tuple(prompt), PARAMS))
        while core.has_work:
            for delta in core.step():
                assert delta.error is None, delta.error
                got[delta.request_id] += [(entry.token_ids, entry.logprobs) for entry in delta.logprobs or ()]
    finally:
        core.close()
    return got["0"] + got["1"]


@pytest.mark.parametrize("kind", ["fp8", "w8a8"])
def test_tokens_are_the_same(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, given = write(kind, tmp_path), set()
    linear = triton.linear

    def noting(x: torch.Tensor | Rounded, *args: object) -> torch.Tensor:
        given.add(x.rounding if isinstance(x, Rounded) else None)
        return linear(x, *args)

    monkeypatch.setattr(triton, "linear", noting)
    fused = found(path)
    assert given == {None, Rounding(torch.float8_e4m3fn, 128) if kind == "fp8" else Rounding(torch.int8, 64)}
    given.clear()
    monkeypatch.setattr(triton, "rounding_of", lambda weight, dtype: None)
    apart = found(path)
    assert given == {None}
    assert len(fused) == 2 * PARAMS.max_tokens
    assert fused == apart

"""gpu.py's section of correctness: the engine on the device against transformers, with tests/models' small models.

In float32 the greedy tokens are the same. In bfloat16, log probabilities of given tokens are about as far from
float32's as those of transformers in bfloat16 are: what both lose is the type's, what one loses more is its own fault.
"""

from __future__ import annotations

import importlib.util
import math
import tempfile
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

import torch
from gpu_rows import Bench, Row
from report import ROOT

from octavo.engine.build import build_engine
from octavo.engine.config import EngineConfig
from octavo.engine.params import SamplingParams
from octavo.engine.types import Request, TokenDelta

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "opt")
LENGTHS = (5, 23, 40)
NEW = 12
Prompts = Sequence[Sequence[int]]
# Of bfloat16's mean and largest errors, as multiples of transformers' own; and what is nothing, in log probability.
MEAN, LARGEST, NOTHING = 1.5, 3.0, 0.01


@cache
def models() -> ModuleType:
    """tests/models/tiny.py."""
    spec = importlib.util.spec_from_file_location("tiny", ROOT / "tests" / "models" / "tiny.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(folder: Path, device: torch.device, prompts: Prompts, params: SamplingParams, **options: Any) -> list[Any]:
    """For each prompt its deltas, from a new engine."""
    settings: dict[str, Any] = {
        "model": str(folder),
        "device": device.type,
        "block_size": 16,
        "max_model_len": 64,
        "max_num_seqs": 8,
        "num_gpu_blocks_override": 200,
    }
    core = build_engine(EngineConfig(**settings | options)).core
    try:
        found: list[list[TokenDelta]] = [[] for _ in prompts]
        for index, prompt in enumerate(prompts):
            core.add(Request(str(index), tuple(prompt), params))
        while core.has_work:
            for delta in core.step():
                assert delta.error is None, delta.error
                found[int(delta.request_id)].append(delta)
        return found
    finally:
        core.close()


def greedy(folder: Path, device: torch.device, prompts: Prompts, new: int, **options: Any) -> list[list[int]]:
    params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
    deltas = run(folder, device, prompts, params, **{"dtype": "float32"} | options)
    return [[token for delta in of_prompt for token in delta.token_ids] for of_prompt in deltas]


def prompt_logprobs(folder: Path, device: torch.device, prompts: Prompts, **options: Any) -> list[list[float]]:
    """Of each prompt's tokens but the first."""
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, prompt_logprobs=0)
    found = []
    for deltas in run(folder, device, prompts, params, **options):
        (whole,) = [delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs is not None]
        found.append([one.logprobs[0] for one in whole if one is not None])
    return found


@torch.inference_mode()
def reference_logprobs(folder: Path, device: torch.device, prompts: Prompts, dtype: torch.dtype) -> list[list[float]]:
    """As `prompt_logprobs`, by transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").to(device)
    found = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)], device=device)
        logprobs = model(ids).logits[0].float().log_softmax(dim=-1)
        found.append(logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist())
    return found


def errors(found: list[list[float]], wanted: list[list[float]]) -> tuple[float, float]:
    """The mean and the largest difference."""
    each = [abs(a - b) for x, y in zip(found, wanted, strict=True) for a, b in zip(x, y, strict=True)]
    return fmean(each), max(each)


def check_greedy(family: str, folder: Path, device: torch.device, **options: Any) -> None:
    """Raises AssertionError. folder: where the family's checkpoint is made."""
    path, prompts = models().make(family, folder), models().prompts(LENGTHS)
    found, wanted = greedy(path, device, prompts, NEW, **options), models().reference_greedy(path, prompts, NEW)
    for length, ours, theirs in zip(LENGTHS, found, wanted, strict=True):
        assert ours == theirs, f"{family}, {length} tokens: {ours} and not {theirs}"


def check_bfloat16(family: str, folder: Path, device: torch.device, **options: Any) -> None:
    path, prompts = models().make(family, folder), models().prompts(LENGTHS)
    exact = reference_logprobs(path, device, prompts, torch.float32)
    theirs = errors(reference_logprobs(path, device, prompts, torch.bfloat16), exact)
    ours = errors(prompt_logprobs(path, device, prompts, dtype="bfloat16", **options), exact)
    said = f"{family}: {ours[0]:.4f} and at most {ours[1]:.4f}, transformers {theirs[0]:.4f} and {theirs[1]:.4f}"
    assert all(map(math.isfinite, ours)), said
    assert ours[0] <= MEAN * theirs[0] + NOTHING, said
    assert ours[1] <= LARGEST * theirs[1] + NOTHING, said


def parity(bench: Bench) -> None:
    families = FAMILIES[:1] if bench.tiny else FAMILIES
    options: dict[str, Any] = {"kernels": "ref"} if bench.device.type == "cpu" else {}
    with tempfile.TemporaryDirectory() as folder:
        for family in families:
            checks = {"greedy, float32": check_greedy, "log probabilities, bfloat16": check_bfloat16}
            for name, check in checks.items():
                if bench.checked(name, family, partial(check, family, Path(folder), bench.device, **options)):
                    bench.row(Row(name, family, note="as transformers has it"))

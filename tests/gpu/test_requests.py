"""What requests may ask for, in mixed batches on the GPU: the tokens and log probabilities of `ref` on the CPU."""

import importlib.util
from pathlib import Path
from typing import Any

import gpu_parity
import pytest
import torch
from engines import DEFINITION, assert_same, on_gpu, outcomes, run, started
from transformers import AutoConfig, AutoModelForCausalLM

from octavo.engine.grammar.spec import StructuredOutputs
from octavo.engine.params import SamplingParams
from octavo.engine.types import Request

tiny = gpu_parity.models()
_spec = importlib.util.spec_from_file_location(
    "structured", Path(__file__).parents[1] / "engine" / "structured" / "conftest.py"
)
structured = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(structured)

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "drawn": {"temperature": 1.0},
    "filtered": {"temperature": 0.7, "top_k": 30, "top_p": 0.8, "min_p": 0.02},
    "logprobs": {"temperature": 0.0, "logprobs": 5},
    "drawn with logprobs": {"temperature": 1.3, "top_k": 5, "logprobs": 0},
    "penalties": {"temperature": 0.0, "presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.2},
    "bias": {"temperature": 0.0, "logit_bias": {7: 4.0, 9: -50.0}},
    "allowed": {"temperature": 1.0, "allowed_token_ids": [5, 6, 7, 8, 90, 91]},
    "several": {"temperature": 1.0, "n": 3},
}
FEW = ("greedy", "filtered", "logprobs", "penalties")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make("llama", tmp_path_factory.mktemp("checkpoints"))


def mixed(names: tuple[str, ...], tokens: int, tag: str = "") -> list[Request]:
    prompts = tiny.prompts([3 + 11 * i % 37 for i in range(len(names))], seed=3)
    return [
        Request(tag + name, tuple(prompt), SamplingParams(seed=i, max_tokens=tokens, ignore_eos=True, **KINDS[name]))
        for i, (name, prompt) in enumerate(zip(names, prompts, strict=True))
    ]


@pytest.mark.parametrize(
    ("names", "tokens", "options"),
    [
        (FEW, 2, {}),
        on_gpu(tuple(KINDS), 30, {}),
        on_gpu(tuple(KINDS), 30, {"enforce_eager": True}),
        on_gpu(tuple(KINDS) * 3, 20, {"max_num_batched_tokens": 32, "max_num_seqs": 32}),
        on_gpu(tuple(KINDS), 30, {"num_gpu_blocks_override": 10, "enable_prefix_caching": False}),
    ],
    ids=["few", "all", "without graphs", "chunks", "preemption"],
)
def test_rows_of_all_kinds(names: tuple[str, ...], tokens: int, options: dict[str, Any], llama: Path) -> None:
    def requests() -> list[Request]:
        return [
            request
            for turn in range(0, len(names), len(KINDS))
            for request in mixed(names[turn : turn + len(KINDS)], tokens, f"{turn} ")
        ]

    with started(llama, **options) as engine:
        found = outcomes(engine.core, requests())
        assert (engine.core.stats().preemptions > 0) == ("enable_prefix_caching" in options)
    assert_same(found, run(llama, requests(), **DEFINITION))


@pytest.mark.parametrize("tokens", [1, on_gpu(20)])
def test_prefix_hits(tokens: int, llama: Path) -> None:
    prompt = tuple(tiny.prompts([50])[0])
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    with started(llama) as engine:
        cold = outcomes(engine.core, [Request("a", prompt, params)])
        warm = outcomes(engine.core, [Request("a", prompt, params), Request("b", (*prompt[:40], 5), params)])
        assert engine.core.stats().prefix_hits >= 80
    assert warm["a", 0].tokens == cold["a", 0].tokens
    other = run(llama, [Request("b", (*prompt[:40], 5), params)], **DEFINITION)
    assert warm["b", 0].tokens == other["b", 0].tokens


@pytest.mark.parametrize("tokens", [4, on_gpu(60)])
def test_structured_output(tokens: int, tmp_path: Path) -> None:
    """Rows with and without a form in one batch."""
    folder = structured.make_model(tmp_path)
    config = AutoConfig.from_pretrained(folder)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    forms = (None, StructuredOutputs(regex="(ab|ba){2,20}x+"), StructuredOutputs(choice=["walking", "reading"]))
    requests = [
        Request(
            str(i),
            (3 + i, 9, 12),
            SamplingParams(seed=i, temperature=0.9, max_tokens=tokens, structured_outputs=form),
        )
        for i, form in enumerate(forms)
    ]
    assert_same(run(folder, requests), run(folder, requests, **DEFINITION))


@pytest.mark.parametrize("lengths", [(5, 9), on_gpu((5, 23, 40, 60))])
def test_logprobs_of_prompts(lengths: tuple[int, ...], llama: Path, device: torch.device) -> None:
    prompts = tiny.prompts(lengths)
    found = gpu_parity.prompt_logprobs(llama, device, prompts, dtype="float32")
    wanted = gpu_parity.reference_logprobs(llama, torch.device("cpu"), prompts, torch.float32)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)

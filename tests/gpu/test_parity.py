"""Every family on the GPU against transformers: greedy tokens in float32, log probabilities in bfloat16."""

from pathlib import Path
from typing import Any

import gpu_parity
import pytest
import torch
from engines import on_gpu

tiny = gpu_parity.models()

CONDITIONS: dict[str, dict[str, Any]] = {
    "whole prompts": {},
    "without graphs": {"enforce_eager": True},
    "chunks of 16": {"max_num_batched_tokens": 16, "max_num_seqs": 16},
    "preemption": {"num_gpu_blocks_override": 8, "enable_prefix_caching": False},
    "blocks of 64": {"block_size": 64},
}


@pytest.mark.parametrize("family", ["llama", *map(on_gpu, tiny.FAMILIES[1:])])
def test_greedy_tokens_equal_transformers(
    family: str, tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cpu":  # interpreted
        monkeypatch.setattr(gpu_parity, "NEW", 2)
        monkeypatch.setattr(gpu_parity, "LENGTHS", (5, 12))
    gpu_parity.check_greedy(family, tmp_path, device, kernels="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "gpt2"])
def test_tokens_are_the_same_under_every_condition(
    family: str, condition: str, tmp_path: Path, device: torch.device
) -> None:
    gpu_parity.check_greedy(family, tmp_path, device, kernels="triton", **CONDITIONS[condition])


@pytest.mark.gpu
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_bfloat16_loses_what_transformers_loses(family: str, tmp_path: Path, device: torch.device) -> None:
    gpu_parity.check_bfloat16(family, tmp_path, device, kernels="triton")

"""Vectors and classes on the GPU, beside those of transformers on the CPU, in float32."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import on_gpu, started

from octavo.engine.core.engine import EngineCore
from octavo.engine.pooling.params import PoolingParams
from octavo.engine.pooling.prompts import pooling_request

_spec = importlib.util.spec_from_file_location("tiny_pooling", Path(__file__).parents[1] / "models" / "tiny_pooling.py")
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

VECTORS = [name for name in tiny.CASES if name not in tiny.CLASSIFIERS]


def pooled(core: EngineCore, params: PoolingParams) -> list[torch.Tensor]:
    wanted = core.scheduler.limits.pooling.resolve(params)
    for i, prompt in enumerate(tiny.prompts()):
        core.add(pooling_request(str(i), [tuple(prompt)], wanted))
    found: dict[int, torch.Tensor] = {}
    while core.has_work:
        for delta in core.step():
            assert delta.error is None, delta.error
            if delta.pooled is not None:
                found[int(delta.request_id)] = torch.from_numpy(np.frombuffer(delta.pooled, "<f4").copy())
    return [found[i] for i in range(len(found))]


def close(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    torch.testing.assert_close(torch.stack(found), torch.stack([each.float() for each in wanted]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [VECTORS[0], *map(on_gpu, VECTORS[1:])])
@pytest.mark.parametrize("how", ["mean", *map(on_gpu, ("last", "cls"))])
def test_vectors(name: str, how: str, tmp_path: Path) -> None:
    states = [tiny.hidden_states(tiny.model(name), prompt) for prompt in tiny.prompts()]
    with started(tiny.make(name, tmp_path), max_model_len=64) as engine:
        close(pooled(engine.core, PoolingParams(pooling_type=how)), [tiny.pooled(each, how) for each in states])


@pytest.mark.parametrize("name", [tiny.CLASSIFIERS[0], *map(on_gpu, tiny.CLASSIFIERS[1:])])
def test_classes(name: str, tmp_path: Path) -> None:
    wanted = [tiny.logits(tiny.model(name), prompt) for prompt in tiny.prompts()]
    with started(tiny.make(name, tmp_path), max_model_len=64) as engine:
        close(pooled(engine.core, PoolingParams(task="classify", use_activation=False)), wanted)

"""An engine that has run for long holds what it held soon after its start: no tensor, no object is left behind.

Hundreds of steps of mixed traffic, on the CPU: with the host's buffers, and with those of a device, op by op: recorded
steps, of which there is a largest number, are kept for good. The engine is looked at when it stands still. What is not
seen here is how a GPU's allocator cuts its memory up: benchmarks/gpu_memory.py looks at that.
"""

import gc
import importlib.util
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.engine.build import build_engine
from octavo.engine.config import EngineConfig
from octavo.engine.core.engine import EngineCore
from octavo.engine.params import SamplingParams
from octavo.engine.runner import build
from octavo.engine.runner.in_flight import HostCopies
from octavo.engine.types import Request

_spec = importlib.util.spec_from_file_location("tiny", Path(__file__).parents[1] / "models" / "tiny.py")
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

Way = dict[str, Any]
PENALTIES: Way = {"temperature": 0.7, "presence_penalty": 0.5, "repetition_penalty": 1.2}
WAYS: tuple[Way, ...] = (
    PENALTIES,
    {"temperature": 0.0},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.9},
    {"temperature": 0.0, "logprobs": 3, "prompt_logprobs": 1},
    {"temperature": 1.0, "logit_bias": {5: 4.0}, "allowed_token_ids": [4, 5, 6, 7]},
    {"temperature": 0.8, "n": 2, "min_tokens": 2},
)


def start(folder: Path, **options: object) -> EngineCore:
    settings = {"dtype": "float32", "block_size": 8, "max_model_len": 64, "max_num_seqs": 8, "seed": 0}
    settings |= {"max_num_batched_tokens": 32, "num_gpu_blocks_override": 24}
    return build_engine(EngineConfig(model=str(folder), **settings | options)).core


def burst(core: EngineCore, rng: random.Random, name: str, requests: int = 12, ways: Sequence[Way] = WAYS) -> None:
    """Requests of these kinds, some of which are aborted; until the engine stands still."""
    for i in range(requests):
        params = SamplingParams(max_tokens=rng.randrange(2, 24), ignore_eos=True, seed=i, **rng.choice(ways))
        shared = [7] * rng.choice((0, 16, 24))
        prompt = shared + [rng.randrange(3, tiny.VOCAB) for _ in range(rng.randrange(1, 16))]
        core.add(Request(f"{name}-{i}", tuple(prompt), params))
    steps = 0
    while core.has_work:
        for delta in core.step():
            assert delta.error is None, delta.error
        steps += 1
        if steps % 17 == 0:
            core.abort(f"{name}-{rng.randrange(requests)}")


def held() -> tuple[int, int, Counter[str]]:
    """(tensors, bytes of their memories, octavo's objects by type) of this process."""
    gc.collect()
    objects = gc.get_objects()
    tensors = [x for x in objects if isinstance(x, torch.Tensor)]
    memories = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    # Libraries may do theirs meanwhile: what another test has imported, or left to be collected.
    counted = Counter(type(x).__name__ for x in objects if str(type(x).__module__).startswith("octavo."))
    return len(tensors), sum(memories.values()), counted


@pytest.mark.parametrize("where", ["host", "device"])
def test_nothing_is_left_behind(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if where == "device":
        monkeypatch.setattr(build, "is_host", lambda device: False)
        for module in ("runner", "sampler"):  # a copy from a device is of what was there then
            monkeypatch.setattr(
                f"octavo.engine.runner.{module}.HostCopies", lambda given: HostCopies(tuple(x.clone() for x in given))
            )
    core = start(tiny.make("llama", tmp_path), enforce_eager=True)
    rng = random.Random(0)
    try:
        burst(core, rng, "penalties", ways=[PENALTIES])  # as many slots at once as can have counts
        for i in range(6):
            burst(core, rng, f"early {i}")
        early, steps = held(), core.stats().steps
        for i in range(9):
            burst(core, rng, f"late {i}")
        late = held()
        assert core.stats().steps - steps > 250
        assert core.stats().preemptions > 0
        core.scheduler.pool.check()
    finally:
        core.close()
    assert late[:2] == early[:2], "tensors, bytes"
    grown = {name: count - early[2][name] for name, count in late[2].items()}
    assert {name: more for name, more in grown.items() if more > 20} == {}, "a request leaves something behind"

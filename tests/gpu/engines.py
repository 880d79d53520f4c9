"""An engine on the GPU, and the one it is compared with: `ref`, on the CPU.

Without a GPU, tests of what an engine does run with the CPU's own ops, to see that they are sound; those of numbers ask
for Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.engine.build import Engine, build_engine
from octavo.engine.config import EngineConfig
from octavo.engine.core.engine import EngineCore
from octavo.engine.types import Request

ON_GPU = "cuda" if torch.cuda.is_available() else "cpu"
DEFINITION = {"device": "cpu", "kernels": "ref"}


def on_gpu(*values: Any) -> Any:
    """A case that needs a GPU."""
    return pytest.param(*values, marks=pytest.mark.gpu)


@dataclass
class Outcome:
    """Of one sequence. logprobs: of each token, (ids, values)."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[tuple[tuple[int, ...], tuple[float, ...]]] = field(default_factory=list)
    reason: str | None = None


@contextmanager
def started(folder: Path | str, **options: Any) -> Iterator[Engine]:
    """On a GPU if there is one, unless options say otherwise."""
    settings: dict[str, Any] = {
        "model": str(folder),
        "device": ON_GPU,
        "dtype": "float32",
        "block_size": 16,
        "max_model_len": 96,
        "max_num_seqs": 8,
        "num_gpu_blocks_override": 100,
    }
    engine = build_engine(EngineConfig(**settings | options))
    try:
        yield engine
    finally:
        engine.core.close()


def outcomes(core: EngineCore, requests: Sequence[Request]) -> dict[tuple[str, int], Outcome]:
    """By request and sequence."""
    for request in requests:
        core.add(request)
    found: dict[tuple[str, int], Outcome] = {}
    while core.has_work:
        for delta in core.step():
            assert delta.error is None, delta.error
            one = found.setdefault((delta.request_id, delta.index), Outcome())
            one.tokens += delta.token_ids
            one.logprobs += [(entry.token_ids, entry.logprobs) for entry in delta.logprobs]
            one.reason = delta.finish_reason
        core.scheduler.pool.check()
    return found


def run(folder: Path | str, requests: Sequence[Request], **options: Any) -> dict[tuple[str, int], Outcome]:
    with started(folder, **options) as engine:
        return outcomes(engine.core, requests)


def assert_same(found: dict[tuple[str, int], Outcome], wanted: dict[tuple[str, int], Outcome]) -> None:
    """The same tokens for the same reasons; log probabilities to float32's precision."""
    assert found.keys() == wanted.keys()
    for key, one in wanted.items():
        assert (found[key].tokens, found[key].reason) == (one.tokens, one.reason), key
        for ours, theirs in zip(found[key].logprobs, one.logprobs, strict=True):
            assert ours[0] == theirs[0], key
            assert ours[1] == pytest.approx(theirs[1], abs=1e-3), key

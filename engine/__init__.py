"""octavo.engine: one model replica, tokens in, tokens out. Public names are loaded when first used: importing a
torch-free part of the package must not import torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octavo.engine.api import LLM, AsyncLLM
    from octavo.engine.beam_search import BeamSearchParams
    from octavo.engine.config import EngineConfig
    from octavo.engine.params import SamplingParams
    from octavo.engine.pooling.params import PoolingParams
    from octavo.engine.types import CompletionOutput, RequestOutput

_HOME = {
    "LLM": "api",
    "AsyncLLM": "api",
    "BeamSearchParams": "beam_search",
    "EngineConfig": "config",
    "PoolingParams": "pooling.params",
    "SamplingParams": "params",
    "RequestOutput": "types",
    "CompletionOutput": "types",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchParams",
    "CompletionOutput",
    "EngineConfig",
    "PoolingParams",
    "RequestOutput",
    "SamplingParams",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"octavo.engine.{_HOME[name]}"), name)
    raise AttributeError(f"module 'octavo.engine' has no attribute {name!r}")

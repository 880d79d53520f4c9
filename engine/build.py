"""The one place where an engine is put together: EngineConfig → a running Engine.

Reads as a list. What is wrong with a configuration is found here, before the weights load where possible.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from octavo.engine.config import EngineConfig
from octavo.engine.core.blocks import BlockPool
from octavo.engine.core.engine import EngineCore, Process
from octavo.engine.core.scheduler import Limits, Scheduler
from octavo.engine.errors import ConfigError
from octavo.engine.types import EngineInfo

Report = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Engine:
    """A built engine and what is known of it."""

    core: EngineCore
    info: EngineInfo


class Phases:
    """Seconds per phase of the start-up, reported as each ends."""

    def __init__(self, report: Report | None) -> None:
        self.done: list[tuple[str, float]] = []
        self._report = report

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self.done.append((name, seconds))
        if self._report is not None:
            self._report(name, seconds)


def build_engine(config: EngineConfig, report: Report | None = None) -> Engine:
    """Build the engine of one replica. `report(phase, seconds)` is called as each phase of the start-up ends.

    Raises ConfigError, in one sentence, if the configuration cannot work.
    """
    if config.model == "fake":
        return build_fake(config)
    from octavo.engine.runner.build import build_local  # imports torch

    return build_local(config, Phases(report))


def build_fake(config: EngineConfig) -> Engine:
    """An engine without a model: FakeRunner and the byte tokenizer's vocabulary. Starts at once, without torch."""
    from octavo.engine.runner.fake import CostModel, FakeRunner
    from octavo.engine.text.byte_tokenizer import ByteTokenizer

    tokenizer = ByteTokenizer()
    info = EngineInfo(
        model="fake",
        max_model_len=config.max_model_len or 4096,
        vocab_size=tokenizer.vocab_size,
        eos_token_ids=tuple(tokenizer.eos_token_ids),
        dtype="none",
        device="none",
        block_size=config.block_size,
        num_blocks=config.num_gpu_blocks_override or 16384,
    )
    runner = FakeRunner(info.num_blocks, info.block_size, cost=CostModel(step_s=0.001))
    return assemble(config, info, runner)


def assemble(config: EngineConfig, info: EngineInfo, process: Process) -> Engine:
    """Scheduler + block pool + process → Engine."""
    if info.num_blocks * info.block_size < info.max_model_len:
        raise ConfigError(
            f"max_model_len ({info.max_model_len}) needs {-(-info.max_model_len // info.block_size)} KV blocks, "
            f"but only {info.num_blocks} fit: lower max_model_len or give the KV cache more memory "
            f"(kv_cache_memory_bytes)."
        )
    if not config.enable_chunked_prefill and config.max_num_batched_tokens < info.max_model_len:
        raise ConfigError(
            f"Without chunked prefill, max_num_batched_tokens ({config.max_num_batched_tokens}) must be at least "
            f"max_model_len ({info.max_model_len})."
        )
    limits = Limits(
        block_size=info.block_size,
        max_model_len=info.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        vocab_size=info.vocab_size,
        eos_token_ids=info.eos_token_ids,
        max_num_queued_reqs=config.max_num_queued_reqs,
        enable_chunked_prefill=config.enable_chunked_prefill,
        long_prefill_token_threshold=config.long_prefill_token_threshold,
        scheduling_policy=config.scheduling_policy,
    )
    scheduler = Scheduler(limits, BlockPool(info.num_blocks, config.enable_prefix_caching))
    core = EngineCore(scheduler, process, time.monotonic, lag=1 if config.async_scheduling else 0)
    return Engine(core, info)

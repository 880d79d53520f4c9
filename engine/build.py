"""The one place where an engine is put together: EngineConfig → a running Engine.

Reads as a list. What is wrong with a configuration is found here, before the weights load where possible.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from octavo.engine import env
from octavo.engine.assets import tokenizer_of
from octavo.engine.config import EngineConfig
from octavo.engine.core.blocks import BlockPool
from octavo.engine.core.engine import EngineCore, Process
from octavo.engine.core.limits import Limits
from octavo.engine.core.scheduler import Scheduler
from octavo.engine.errors import ConfigError
from octavo.engine.grammar.grammars import CompiledGrammars
from octavo.engine.pooling.info import PoolingInfo
from octavo.engine.types import EngineInfo

if TYPE_CHECKING:
    from octavo.engine.runner.fake import FakeRunner

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
        self.end(name, time.perf_counter() - started)

    def end(self, name: str, seconds: float) -> None:
        """A phase that ended elsewhere."""
        self.done.append((name, seconds))
        if self._report is not None:
            self._report(name, seconds)


@dataclass(frozen=True, slots=True)
class RankOptions:
    """How the rank processes of a replica are run; of no meaning with one rank, which has no process of its own.

    label: what the replica is called in Ray's dashboard. num_cpus: that Ray reserves for each rank, outside of a
    placement group. threads: of the CPU for each rank, None = as many as Ray gives it. start_timeout_s: until all are
    there and call. hang_timeout_s: how long one may give no sign of life. step_timeout_s: longer than any step can be.
    """

    label: str = ""
    num_cpus: float = 1.0
    threads: int | None = None
    start_timeout_s: float = 120.0
    hang_timeout_s: float = 4.0
    step_timeout_s: float = 300.0


def build_engine(config: EngineConfig, report: Report | None = None, options: RankOptions | None = None) -> Engine:
    """Build the engine of one replica. `report(phase, seconds)` is called as each phase of the start-up ends.

    Raises ConfigError, in one sentence, if the configuration cannot work; RankLost if a rank dies on the way.
    """
    if config.num_ranks > 1:
        from octavo.engine.process.actors import build_ranks  # imports Ray

        phases = Phases(report)
        engine = build_ranks(config, phases, options or RankOptions())
        return replace(engine, info=replace(engine.info, phases=tuple(phases.done)))
    if config.is_fake:
        return build_fake(config)
    if config.device != "cpu":
        env.prepare_gpu_allocator()
    from octavo.engine.runner.build import build_local  # imports torch

    return build_local(config, Phases(report))


def build_fake(config: EngineConfig) -> Engine:
    """An engine without a model: FakeRunner and the byte tokenizer's vocabulary. Starts at once, without torch."""
    info = fake_info(config)
    return assemble(config, info, fake_runner(config, info))


def fake_runner(config: EngineConfig, info: EngineInfo, stages: int = 1) -> FakeRunner:
    """One rank of an engine without a model."""
    from octavo.engine.runner.fake import FakeRunner, cost_of

    return FakeRunner(info.num_blocks, info.block_size, cost=cost_of(config.model), stages=stages)


def fake_info(config: EngineConfig) -> EngineInfo:
    """What an engine without a model is."""
    from octavo.engine.runner.fake import FAKE_EMBEDDING
    from octavo.engine.text.byte_tokenizer import ByteTokenizer

    tokenizer = ByteTokenizer()
    return EngineInfo(
        model="fake",
        max_model_len=config.max_model_len or 4096,
        vocab_size=tokenizer.vocab_size,
        eos_token_ids=tuple(tokenizer.eos_token_ids),
        dtype="none",
        device="none",
        block_size=config.block_size,
        num_blocks=config.num_gpu_blocks_override or 16384,
        pooling=PoolingInfo(embedding_size=FAKE_EMBEDDING),
    )


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
    # Tokens of an encoder see those behind them: a prompt is computed whole, and its KV is not kept.
    whole = not info.pooling.is_causal
    most_tokens = max(config.max_num_batched_tokens, info.max_model_len) if whole else config.max_num_batched_tokens
    limits = Limits(
        block_size=info.block_size,
        max_model_len=info.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=most_tokens,
        vocab_size=info.vocab_size,
        eos_token_ids=info.eos_token_ids,
        max_num_queued_reqs=config.max_num_queued_reqs,
        enable_chunked_prefill=config.enable_chunked_prefill and not whole,
        long_prefill_token_threshold=config.long_prefill_token_threshold,
        scheduling_policy=config.scheduling_policy,
        stages=config.pipeline_parallel_size,
        pooling=info.pooling,
    )
    scheduler = Scheduler(limits, BlockPool(info.num_blocks, config.enable_prefix_caching and not whole))
    # A pipeline is full with a step per stage; a single stage plans the next step while one runs.
    lag = max(1, config.pipeline_parallel_size - 1) if config.async_scheduling else 0
    grammars = CompiledGrammars(lambda: tokenizer_of(config), info.vocab_size, info.eos_token_ids)
    return Engine(EngineCore(scheduler, process, time.monotonic, lag, grammars), info)

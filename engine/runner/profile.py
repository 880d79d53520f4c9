"""What a rank takes of its GPU's memory besides KV, measured: a step of each largest shape is run, and torch asked.

Knows models as functions, ops and torch's allocator. Does not know what follows from the numbers: memory.py plans.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from octavo.engine.errors import ConfigError
from octavo.engine.layers.attention import KVCaches
from octavo.engine.layers.kv import KVSpec
from octavo.engine.runner.kv_pool import KVPool
from octavo.engine.runner.memory import Measured, size
from octavo.engine.runner.whole_steps import MAX_TOKENS
from octavo.kernels.ops import AttentionBatch, Ops
from octavo.kernels.sampling import Draws

# A recorded step's own memory, in the driver, for some hundred launches. Not measured yet; and how many there may be.
GRAPH_BYTES = 2 << 20
MOST_GRAPHS = 96


class Model(Protocol):
    """What is asked of a model here; see octavo.engine.runner.runner."""

    def __call__(
        self, x: torch.Tensor, positions: torch.Tensor, kv: KVCaches, batch: AttentionBatch
    ) -> torch.Tensor: ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor: ...

    def kv_specs(self) -> tuple[KVSpec, ...]: ...


@dataclass(frozen=True, slots=True)
class Before:
    """A GPU before weights come. reserved, allocated: of it by torch in this process."""

    total: int
    free: int
    reserved: int
    allocated: int

    @property
    def outside(self) -> int:
        """Of torch's allocator: other processes, contexts, code."""
        return self.total - self.free - self.reserved


@dataclass(frozen=True, slots=True)
class Limits:
    """Of a rank's steps. max_model_len: the longest sequence. takes_logits: this rank draws tokens. hidden: of a later
    stage's inputs (width, dtype); None = token ids. vocab_size: of logits. records: steps are recorded."""

    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int
    block_size: int
    vocab_size: int
    takes_logits: bool
    hidden: tuple[int, torch.dtype] | None
    records: bool


def look(device: torch.device) -> Before:
    """device: of CUDA. Sets up this process' context there, if it has none."""
    torch.cuda.init()
    free, total = torch.cuda.mem_get_info(device)
    return Before(total, free, torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device))


def measure(before: Before, model: Model, ops: Ops, limits: Limits, device: torch.device) -> Measured:
    """With the weights there and KV not. All ranks of a replica are to call it together. Raises ConfigError where not
    even a step has room."""
    weights = torch.cuda.memory_allocated(device) - before.allocated
    try:
        full = _peak(model, ops, limits, device, decode=False)
        small = _peak(model, ops, limits, device, decode=True)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"A step of {limits.max_num_batched_tokens} tokens has no room on the GPU: of {size(before.total)}, "
            f"{size(before.total - before.free)} were held by others and by the context and {size(weights)} are "
            f"weights: lower max_num_batched_tokens or max_num_seqs, or quantize the weights ({_first_line(error)})."
        ) from None
    torch.cuda.empty_cache()
    now = look(device)
    return Measured(
        total=before.total,
        free=before.free,
        weights=weights,
        activations=max(full, small),
        buffers=buffer_bytes(limits),
        graphs=graph_bytes(small) if limits.records else 0,
        libraries=max(0, now.outside - before.outside),
    )


def buffer_bytes(limits: Limits) -> int:
    """Tokens and block tables of every slot, and, where tokens are drawn, counts for penalties: four bytes and one per
    slot and token, and a part of them twice while their number grows."""
    slots, rows = limits.max_num_seqs + 1, min(limits.max_num_seqs, MAX_TOKENS)
    per_slot = 4 * (limits.max_model_len + 1) + 4 * -(-limits.max_model_len // limits.block_size)
    counts = 5 * limits.max_num_seqs * limits.vocab_size * 3 // 2 if limits.takes_logits else 0
    logits = 4 * rows * limits.vocab_size if limits.takes_logits and limits.records else 0  # of recorded steps
    return slots * per_slot + counts + logits


def graph_bytes(small_step: int) -> int:
    """What recorded steps keep. They share the memory of the largest; and what was computed on their stream before the
    first recording stays with that stream."""
    return 2 * small_step + MOST_GRAPHS * GRAPH_BYTES


def _peak(model: Model, ops: Ops, limits: Limits, device: torch.device, decode: bool) -> int:
    """The most a step takes beyond what is there before it."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run_step(model, ops, limits, device, decode)
    torch.cuda.synchronize(device)
    return max(0, torch.cuda.max_memory_allocated(device) - before)


@torch.inference_mode()
def run_step(model: Model, ops: Ops, limits: Limits, device: torch.device, decode: bool) -> None:
    """A step of max_num_batched_tokens in as few rows as can be, or of a token for each of max_num_seqs rows (decode);
    then logits of max_num_seqs rows, and draws of the kind that takes most.

    Nothing is written, and of KV nothing read but the first block of a pool of two: shapes are those of the largest
    step, which is what memory depends on, and its work is not done.
    """
    tokens, longest = limits.max_num_batched_tokens, limits.max_model_len
    widths = [1] * limits.max_num_seqs
    if not decode:
        widths = [min(longest, tokens - start) for start in range(0, tokens, longest)]
    count, rows = sum(widths), len(widths)
    ends = np.cumsum([0, *widths])
    positions = np.concatenate([np.arange(width) for width in widths])
    lengths = torch.tensor(widths, dtype=torch.int32, device=device)
    batch = AttentionBatch(
        block_tables=torch.zeros(rows, -(-longest // limits.block_size), dtype=torch.int32, device=device),
        query_start=torch.tensor(ends, dtype=torch.int32, device=device),
        context_lens=lengths,
        slot_mapping=torch.full((count,), -1, dtype=torch.int64, device=device),
        max_query_len=max(widths),
        max_context_len=longest,
    )
    if limits.hidden is None:
        x = torch.zeros(count, dtype=torch.int64, device=device)
    else:
        x = torch.zeros(count, limits.hidden[0], dtype=limits.hidden[1], device=device)
    pool = KVPool.allocate(model.kv_specs(), 2, limits.block_size, device)
    hidden = model(x, torch.tensor(positions, dtype=torch.int64, device=device), pool.caches, batch)
    if limits.takes_logits:
        _draw(model.logits(hidden[: limits.max_num_seqs]), ops)


def _draw(logits: torch.Tensor, ops: Ops) -> None:
    """What a sampler has at once at the most: logits as they were and as they are changed, and draws with filters."""
    logits = logits.to(torch.float32).contiguous()
    changed = logits.clone()
    peaks = ops.find_peaks(changed)
    ones = np.ones(len(logits))
    rows = np.arange(len(logits))
    draws = Draws(rows, ones, np.full(len(logits), min(50, logits.shape[1])), ones * 0.9, ones * 0, ones * 0.5)
    token_ids = ops.draw(changed, peaks, draws)
    ops.take_logprobs(logits, token_ids, min(20, logits.shape[1]))


def _first_line(error: BaseException) -> str:
    return str(error).strip().split(". ")[0].rstrip(".")

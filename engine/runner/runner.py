"""Runner: executes step plans on one rank.

Knows the model, the KV pool, the buffers and the sampler, and calls them in order. Only what every model needs belongs
here. It decides nothing: which rows, which blocks, when to stop, all is the scheduler's.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from msgspec import structs

from octavo.engine.core.plan import NO_MASKS, MaskSource, Row, RowResult, StepPlan, StepResult
from octavo.engine.layers.kv import KVSpec
from octavo.engine.parallel.mesh import Group
from octavo.engine.pooling.worker import Pooler
from octavo.engine.runner.buffers import Buffers, StepInputs
from octavo.engine.runner.graph import StepGraphs
from octavo.engine.runner.kv_pool import KVPool
from octavo.engine.runner.logprobs import prompt_logprobs
from octavo.engine.runner.masks import to_masks
from octavo.engine.runner.sampler import Sampler
from octavo.engine.runner.sampling_state import SamplingState
from octavo.engine.runner.stage import Stage
from octavo.engine.runner.vocab import VocabGather
from octavo.engine.types import TokenLogprobs
from octavo.kernels.ops import AttentionBatch, Ops


class Model(Protocol):
    """What the runner asks of a model; octavo.engine.models has the families."""

    def __call__(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        kv: Sequence[tuple[torch.Tensor, torch.Tensor]],
        batch: AttentionBatch,
    ) -> torch.Tensor:
        """x: input ids [T] int64 on the first stage, hidden states [T, M] on later ones, which are given up; positions:
        [T] int64; kv: per attention layer (key, value) → hidden states [T, M]."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [R, M] of the last stage → [R, V] float32, on every rank of it."""

    def local_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """As `logits`, the token ids of this rank alone: vocab_shares[tp.rank]."""

    @property
    def vocab_shares(self) -> tuple[range, ...]:
        """The token ids of every rank of `tp`."""

    tp: Group

    def kv_specs(self) -> tuple[KVSpec, ...]:
        """What each attention layer keeps per token, in the order of `kv`."""


class Runner:
    """One rank's half of the engine: `execute` turns a StepPlan into a StepResult.

    Every rank of the last stage draws the same tokens; the ranks of other stages have no results.
    """

    def __init__(
        self,
        model: Model,
        pool: KVPool,
        ops: Ops,
        buffers: Buffers,
        sampling: SamplingState,
        device: torch.device,
        stage: Stage,
        forward: StepGraphs,
        pooler: Pooler,
    ) -> None:
        self.model = model
        self.stage, self.forward = stage, forward
        self.pool = pool
        self.ops = ops
        self.buffers = buffers
        self.sampling = sampling
        self.pooler = pooler
        self.sampler, self.vocab = Sampler(ops), VocabGather(ops, model.tp, model.vocab_shares)
        self.device = device

    @torch.inference_mode()
    def execute(self, plan: StepPlan, masks: MaskSource = NO_MASKS) -> StepResult:
        started = time.perf_counter()
        self._apply(plan)
        inputs = self.buffers.inputs(plan.rows, self.device)
        if not self.stage.is_first:
            inputs = replace(inputs, x=self.stage.receive(len(inputs.x)))
        hidden = self.forward(inputs)
        results: tuple[RowResult, ...] = ()
        if self.stage.is_last:
            results = self._draw(plan, inputs, hidden, masks)
        else:
            self.stage.send(hidden)
        return StepResult(plan.step_id, results, time.perf_counter() - started)

    def _apply(self, plan: StepPlan) -> None:
        """Bring the rank's state up to the plan, before anything is computed."""
        if self.stage.is_last:
            for slot in plan.released:
                self.sampling.leave(slot)
                self.pooler.leave(slot)
            for new in plan.new:
                self.sampling.enter(new)
                self.pooler.enter(new)
        self.buffers.apply(plan)
        if plan.copies:
            pairs = torch.tensor(plan.copies, dtype=torch.int64, device=self.device)
            for key_cache, value_cache in self.pool.caches:
                self.ops.copy_blocks(key_cache, value_cache, pairs)

    def _draw(
        self, plan: StepPlan, inputs: StepInputs, hidden: torch.Tensor, masks: MaskSource
    ) -> tuple[RowResult, ...]:
        """Draw a token for each row that samples; log probabilities of prompt tokens, and pooled vectors, where asked
        for."""
        rows = plan.rows
        prompt = {i: self._prompt_logprobs(row, inputs, hidden, i) for i, row in enumerate(rows) if _wants_prompt(row)}
        pooled = self.pooler.pool(rows, inputs.last, hidden)
        sampling = np.flatnonzero([row.samples for row in rows])
        drawn: tuple[RowResult, ...] = ()
        if len(sampling):
            if len(sampling) < len(hidden):  # else each row is one token, and samples
                hidden = hidden[torch.from_numpy(inputs.last[sampling]).to(self.device)]
            slots, positions = inputs.slots[sampling], inputs.ends[sampling]
            masked = np.flatnonzero([rows[i].masked for i in sampling.tolist()])
            logits = self.vocab.gather(self.model.local_logits(hidden), slots, positions, self.sampling, masked)
            allowed = to_masks(masks.take(plan.step_id), masked, self.device) if len(masked) else None
            sampled = self.sampler.sample(logits, slots, positions, self.sampling, self.buffers.tokens, allowed)
            self.buffers.store(slots, positions, sampled.token_ids)
            drawn = sampled.to_host()
        if len(drawn) == len(rows) and not prompt:
            return drawn
        results = pooled | dict(zip(sampling.tolist(), drawn, strict=True))
        return tuple(_with_prompt(results.get(i, RowResult()), prompt.get(i, ())) for i in range(len(rows)))

    def _prompt_logprobs(
        self, row: Row, inputs: StepInputs, hidden: torch.Tensor, index: int
    ) -> tuple[TokenLogprobs, ...]:
        """Log probabilities of the prompt tokens that this row's positions predict."""
        assert row.prompt_logprobs is not None
        last = min(row.start + row.num_tokens, self.buffers.num_prompt(row.slot) - 1)
        count = last - row.start
        first = int(inputs.last[index]) + 1 - row.num_tokens
        targets = self.buffers.tokens[row.slot, row.start + 1 : last + 1].to(torch.int64)
        found: list[TokenLogprobs] = []
        for begin in range(0, count, 256):  # logits of a whole long prompt at once would be gigabytes
            end = min(count, begin + 256)
            logits = self.model.logits(hidden[first + begin : first + end])
            found.extend(prompt_logprobs(self.ops, logits, targets[begin:end], row.prompt_logprobs))
        return tuple(found)


def _wants_prompt(row: Row) -> bool:
    return row.prompt_logprobs is not None


def _with_prompt(result: RowResult, prompt_logprobs: tuple[TokenLogprobs, ...]) -> RowResult:
    return structs.replace(result, prompt_logprobs=prompt_logprobs) if prompt_logprobs else result

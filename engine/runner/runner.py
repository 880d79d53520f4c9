"""Runner: executes step plans on one rank.

Knows the model, the KV pool, the buffers and the sampler, and calls them in order. Only what every model needs belongs
here. It decides nothing: which rows, which blocks, when to stop, all is the scheduler's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Protocol

import numpy as np
import torch
from msgspec import structs

from octavo.engine.core.plan import NO_MASKS, Computed, MaskSource, Pending, Row, RowResult, StepPlan, StepResult
from octavo.engine.layers.kv import KVSpec
from octavo.engine.parallel.mesh import Group
from octavo.engine.pooling.worker import Pooler
from octavo.engine.runner.buffers import Buffers, RowArrays, StepInputs
from octavo.engine.runner.device import Clock, HostClock, make_clock
from octavo.engine.runner.device_buffers import DeviceBuffers
from octavo.engine.runner.in_flight import HostCopies, InFlight
from octavo.engine.runner.kv_pool import KVPool
from octavo.engine.runner.logprobs import prompt_logprobs
from octavo.engine.runner.masks import to_masks
from octavo.engine.runner.sampler import SampledTokens, Sampler, row_results
from octavo.engine.runner.sampling_state import NO_LOGPROBS, Ints, SamplingState
from octavo.engine.runner.stage import Stage
from octavo.engine.runner.vocab import VocabGather
from octavo.engine.runner.whole_steps import Kind, WholeSteps
from octavo.engine.types import TokenLogprobs
from octavo.kernels.ops import AttentionBatch, Ops
from octavo.kernels.sampling import Draws
from octavo.kernels.send import send

Finish = Callable[[], tuple[RowResult, ...]]  # waits for what a step's results need, and makes them


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
    """One rank's half of the engine: `execute` turns a StepPlan into a StepResult, on its way.

    Every rank of the last stage draws the same tokens; the ranks of other stages have no results.
    """

    def __init__(
        self,
        model: Model,
        pool: KVPool,
        ops: Ops,
        buffers: Buffers | DeviceBuffers,
        sampling: SamplingState,
        device: torch.device,
        stage: Stage,
        forward: Callable[[StepInputs], torch.Tensor],
        pooler: Pooler,
        replay: WholeSteps | None = None,
    ) -> None:
        """forward: hidden states [T, M] of a step; may be overwritten by the next. replay: of steps that the device can
        do by itself. With DeviceBuffers, a step is under way when `execute` returns."""
        self.model = model
        self.stage, self.forward, self.replay = stage, forward, replay
        self.pool = pool
        self.ops = ops
        self.buffers = buffers
        self.sampling = sampling
        self.pooler = pooler
        self.device = device
        self._is_host = isinstance(buffers, Buffers)
        self.sampler = Sampler(ops)
        self.vocab = VocabGather(ops, model.tp, model.vocab_shares, may_wait=self._is_host)
        self.clock: Clock = HostClock() if self._is_host else make_clock(device)

    @torch.inference_mode()
    def execute(self, plan: StepPlan, masks: MaskSource = NO_MASKS) -> Pending:
        self.clock.begin()
        self._apply(plan)
        rows = RowArrays.of(plan.rows)
        finish = self._replayed(plan, rows, masks) or self._computed(plan, rows, masks)
        if self._is_host:
            return Computed(StepResult(plan.step_id, finish(), *self.clock.end().read()))
        return InFlight(plan.step_id, finish, self.clock.end())

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
            pairs = send(np.array(plan.copies, dtype=np.int64), self.device)
            for key_cache, value_cache in self.pool.caches:
                self.ops.copy_blocks(key_cache, value_cache, pairs)

    def _replayed(self, plan: StepPlan, rows: RowArrays, masks: MaskSource) -> Finish | None:
        """The step as a recorded one; None: it cannot be, and nothing is done yet."""
        if self.replay is None or self.pooler or any(map(_wants_prompt, plan.rows)):
            return None
        sampling = np.flatnonzero(rows.samples)
        kind, draws = self._kind(plan, rows, sampling)
        shape = self.replay.shape(rows, kind)
        if shape is None:
            return None
        x = None if self.stage.is_first else self.stage.receive(rows.num_tokens)
        self.clock.launch()
        result = self.replay.run(shape, rows, draws, x)
        if result is None:  # this once: from now on `shape` says so
            return self._computed(plan, rows, masks, x)
        if kind is Kind.HIDDEN:
            self.stage.send(result[: rows.num_tokens])
            return lambda: ()
        if kind is Kind.LOGITS:
            return self._sampled(plan, rows, masks, sampling, result)
        copies = HostCopies((result,))
        return lambda: _placed(len(plan.rows), sampling, _drawn(copies.wait()[0], sampling))

    def _kind(self, plan: StepPlan, rows: RowArrays, sampling: Ints) -> tuple[Kind, Draws | None]:
        """How a recorded step ends, and how the rows are drawn that are not greedy."""
        assert self.replay is not None
        if not self.stage.is_last:
            return Kind.HIDDEN, None
        if not len(sampling):
            return Kind.GREEDY, None
        drawn = self.sampling.rows(rows.slots[sampling], rows.ends[sampling])
        plain = self.model.tp.size == 1 and not any(row.masked for row in plan.rows)
        if not plain or (drawn.logprobs != NO_LOGPROBS).any() or self.sampling.edits(drawn).any():
            return Kind.LOGITS, None
        drawing = np.flatnonzero(~drawn.greedy)
        if not len(drawing):
            return Kind.GREEDY, None
        if not self.replay.draws_filtered:
            return Kind.LOGITS, None
        draws = self.sampling.draws(drawn, drawing)
        kind = Kind.FILTERED if draws.filtered(self.sampling.vocab_size) else Kind.DRAWN
        return kind, replace(draws, rows=sampling[drawing])

    def _computed(self, plan: StepPlan, rows: RowArrays, masks: MaskSource, x: torch.Tensor | None = None) -> Finish:
        """The step, op by op. x: what a later stage starts from, if it is here already."""
        inputs = self.buffers.inputs(rows)
        if not self.stage.is_first:
            inputs = replace(inputs, x=self.stage.receive(len(inputs.x)) if x is None else x)
        self.clock.launch()
        hidden = self.forward(inputs)
        if not self.stage.is_last:
            self.stage.send(hidden)
            return lambda: ()
        wanting = [i for i, row in enumerate(plan.rows) if _wants_prompt(row)]
        prompt = {i: self._prompt_logprobs(plan.rows[i], inputs, hidden, i) for i in wanting}
        pooled = self.pooler.pool(plan.rows, inputs.last, hidden)
        sampling = np.flatnonzero(rows.samples)
        if not len(sampling):
            return lambda: _with_prompts(_placed(len(plan.rows), sampling, (), pooled), prompt)
        if len(sampling) < len(hidden):  # else each row is one token, and samples
            hidden = hidden[send(inputs.last[sampling], self.device)]
        drawn = self._sample(plan, rows, masks, sampling, self.model.local_logits(hidden))
        return lambda: _with_prompts(_placed(len(plan.rows), sampling, drawn.to_host(), pooled), prompt)

    def _sampled(
        self, plan: StepPlan, rows: RowArrays, masks: MaskSource, sampling: Ints, logits: torch.Tensor
    ) -> Finish:
        """logits: [at least R, V of this rank], of every row's last token."""
        if not len(sampling):
            return lambda: _placed(len(plan.rows), sampling, ())
        every = len(sampling) == len(plan.rows)
        local = logits[: len(sampling)] if every else logits[send(sampling, self.device)]
        drawn = self._sample(plan, rows, masks, sampling, local)
        return lambda: _placed(len(plan.rows), sampling, drawn.to_host())

    def _sample(
        self, plan: StepPlan, rows: RowArrays, masks: MaskSource, sampling: Ints, local: torch.Tensor
    ) -> SampledTokens:
        """A token for each row of `sampling`, whose logits `local` [len(sampling), V of this rank] are."""
        slots, positions = rows.slots[sampling], rows.ends[sampling]
        masked = np.flatnonzero([plan.rows[i].masked for i in sampling.tolist()])
        logits = self.vocab.gather(local, slots, positions, self.sampling, masked)
        allowed = to_masks(masks.take(plan.step_id), masked, self.device) if len(masked) else None
        sampled = self.sampler.sample(logits, slots, positions, self.sampling, self.buffers.tokens, allowed)
        self.buffers.store(slots, positions, sampled.token_ids)
        return sampled

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


def _drawn(result: torch.Tensor, sampling: Ints) -> tuple[RowResult, ...]:
    """Of the rows `sampling`. result: [2, at least R] int32 on the host, see WholeSteps.run."""
    at = torch.from_numpy(sampling)
    token_ids, tops = result[0, at], result[1, at].view(torch.float32)
    return row_results(token_ids.tolist(), tops.tolist())


def _placed(
    count: int, sampling: Ints, drawn: tuple[RowResult, ...], pooled: Mapping[int, RowResult] = MappingProxyType({})
) -> tuple[RowResult, ...]:
    """The results of all `count` rows, of which those that `sampling` names have drawn."""
    if len(drawn) == count:
        return drawn
    results = {**pooled, **dict(zip(sampling.tolist(), drawn, strict=True))}
    return tuple(results.get(i, RowResult()) for i in range(count))


def _with_prompts(
    results: tuple[RowResult, ...], prompt: Mapping[int, tuple[TokenLogprobs, ...]]
) -> tuple[RowResult, ...]:
    if not any(prompt.values()):
        return results
    given = (prompt.get(i, ()) for i in range(len(results)))
    return tuple(
        structs.replace(result, prompt_logprobs=logprobs) if logprobs else result
        for result, logprobs in zip(results, given, strict=True)
    )

"""Graphs of decode steps: a forward in which every row is one token, recorded once per number of rows, then replayed.

What a graph saves is the host's time between ops. It reads the step's inputs from memory that stays where it is. Knows
the model as a function; whether and how a forward can be recorded is the affair of the ops' body.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from octavo.engine.runner.buffers import StepInputs
from octavo.kernels.ops import AttentionBatch, Graph, NotRecordable, Ops

log = logging.getLogger(__name__)

KVCaches = Sequence[tuple[torch.Tensor, torch.Tensor]]
Forward = Callable[[torch.Tensor, torch.Tensor, KVCaches, AttentionBatch], torch.Tensor]

MAX_ROWS = 64  # beyond it, the ops take so long that the host's time does not show


class StepGraphs:
    """Stands in for the model's forward: replays a graph where there can be one.

    max_seqs, table_width: of the rank's buffers.
    """

    def __init__(self, forward: Forward, caches: KVCaches, ops: Ops, max_seqs: int, table_width: int) -> None:
        self._forward, self._caches, self._record = forward, caches, ops.record
        self._graphs: dict[int, Graph] = {}
        rows = min(MAX_ROWS, max_seqs)
        self._rows = rows if self._record is not None else 0
        self._inputs = _FixedInputs(self._rows, table_width)

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        """Hidden states [T, M]; those of a graph are overwritten by the next call."""
        rows = len(inputs.slots)
        if rows > self._rows or rows != len(inputs.input_ids):
            return self._forward(inputs.input_ids, inputs.positions, self._caches, inputs.attention)
        self._inputs.take(inputs)
        graph = self._graphs.get(rows)
        if graph is not None:
            hidden: torch.Tensor = graph.replay()
            return hidden
        return self._first(rows, inputs)

    def _first(self, rows: int, inputs: StepInputs) -> torch.Tensor:
        """The recording is itself the step. A forward that cannot be recorded is computed again, as it is."""
        assert self._record is not None
        fixed = self._inputs.of(rows)
        try:
            graph, hidden = self._record(lambda: self._forward(*fixed[:2], self._caches, fixed[2]))
        except NotRecordable as error:
            log.info("Decode steps run without graphs: %s.", error)
            self._rows = 0
            return self._forward(inputs.input_ids, inputs.positions, self._caches, inputs.attention)
        self._graphs[rows] = graph
        return hidden


class _FixedInputs:
    """A step's inputs in memory that never moves, on the CPU."""

    def __init__(self, rows: int, table_width: int) -> None:
        self._ids = torch.zeros(rows, dtype=torch.int64)
        self._positions = torch.zeros(rows, dtype=torch.int64)
        self._slot_mapping = torch.zeros(rows, dtype=torch.int64)
        self._context_lens = torch.zeros(rows, dtype=torch.int32)
        self._query_start = torch.arange(rows + 1, dtype=torch.int32)
        self._tables = torch.zeros(rows, table_width, dtype=torch.int32)

    def take(self, inputs: StepInputs) -> None:
        rows, batch = len(inputs.slots), inputs.attention
        self._ids[:rows] = inputs.input_ids
        self._positions[:rows] = inputs.positions
        self._slot_mapping[:rows] = batch.slot_mapping
        self._context_lens[:rows] = batch.context_lens
        self._tables[:rows, : batch.block_tables.shape[1]] = batch.block_tables

    def of(self, rows: int) -> tuple[torch.Tensor, torch.Tensor, AttentionBatch]:
        """For that many rows of one token. The maxima hold for any step."""
        batch = AttentionBatch(
            block_tables=self._tables[:rows],
            query_start=self._query_start[: rows + 1],
            context_lens=self._context_lens[:rows],
            slot_mapping=self._slot_mapping[:rows],
            max_query_len=1,
            max_context_len=self._tables.shape[1],
        )
        return self._ids[:rows], self._positions[:rows], batch

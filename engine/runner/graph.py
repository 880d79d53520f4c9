"""Graphs of small steps: forwards recorded once per number of tokens and rows, then replayed.

What a graph saves is the host's time between ops, which is most of what a small step takes beyond its ops. It reads the
step's inputs from memory that stays where it is. Knows the model as a function; whether and how a forward can be
recorded is the affair of the ops' body.
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

MAX_TOKENS = 256  # of a step; beyond it, the ops take so long that the host's time does not show
MAX_GRAPHS = 256  # kept, the last used; some 100 kB each


class StepGraphs:
    """Stands in for the model's forward: replays a graph where there can be one.

    Decode steps (every row one token) are recorded when they first come, others when their shape comes again: chunks
    of prompts have many shapes. max_seqs, table_width: of the rank's buffers. hidden: (width, dtype) of what a later
    stage of a pipeline starts from; None = token ids. collective: the forward exchanges tensors with other ranks, which
    cannot be recorded.
    """

    def __init__(
        self,
        forward: Forward,
        caches: KVCaches,
        ops: Ops,
        max_seqs: int,
        table_width: int,
        hidden: tuple[int, torch.dtype] | None = None,
        collective: bool = False,
    ) -> None:
        self._forward, self._caches, self._record = forward, caches, None if collective else ops.record
        self._graphs: dict[tuple[int, int], Graph] = {}
        self._seen: set[tuple[int, int]] = set()
        self._most = MAX_TOKENS if self._record is not None else 0
        self._inputs = _FixedInputs(self._most, min(self._most, max_seqs), table_width, hidden)

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        """Hidden states [T, M]; those of a graph are overwritten by the next call."""
        tokens, rows = shape = len(inputs.x), len(inputs.slots)
        often = tokens == rows or shape in self._seen
        if tokens <= self._most and not often:
            self._seen.add(shape)
        if tokens > self._most or not often:
            return self._forward(inputs.x, inputs.positions, self._caches, inputs.attention)
        self._inputs.take(inputs)
        graph = self._graphs.pop(shape, None)
        if graph is None:
            return self._first(shape, inputs)
        self._graphs[shape] = graph  # now the last used
        return graph.replay()

    def _first(self, shape: tuple[int, int], inputs: StepInputs) -> torch.Tensor:
        """The recording is itself the step. A forward that cannot be recorded is computed again, as it is."""
        assert self._record is not None
        fixed = self._inputs.of(*shape)
        try:
            graph, hidden = self._record(lambda: self._forward(*fixed[:2], self._caches, fixed[2]))
        except NotRecordable as error:
            log.info("Steps run without graphs: %s.", error)
            self._most = 0
            return self._forward(inputs.x, inputs.positions, self._caches, inputs.attention)
        if len(self._graphs) >= MAX_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        self._graphs[shape] = graph
        return hidden


class _FixedInputs:
    """A step's inputs in memory that never moves, on the CPU."""

    def __init__(self, tokens: int, rows: int, table_width: int, hidden: tuple[int, torch.dtype] | None) -> None:
        width, dtype = hidden or (None, torch.int64)
        self._x = torch.zeros((tokens,) if width is None else (tokens, width), dtype=dtype)
        self._positions = torch.zeros(tokens, dtype=torch.int64)
        self._slot_mapping = torch.zeros(tokens, dtype=torch.int64)
        self._context_lens = torch.zeros(rows, dtype=torch.int32)
        self._query_start = torch.zeros(rows + 1, dtype=torch.int32)
        self._tables = torch.zeros(rows, table_width, dtype=torch.int32)
        self._max_context = (1 << 31) - 1

    def take(self, inputs: StepInputs) -> None:
        tokens, rows, batch = len(inputs.x), len(inputs.slots), inputs.attention
        self._x[:tokens] = inputs.x
        self._positions[:tokens] = inputs.positions
        self._slot_mapping[:tokens] = batch.slot_mapping
        self._context_lens[:rows] = batch.context_lens
        self._query_start[: rows + 1] = batch.query_start
        self._tables[:rows, : batch.block_tables.shape[1]] = batch.block_tables

    def of(self, tokens: int, rows: int) -> tuple[torch.Tensor, torch.Tensor, AttentionBatch]:
        """The maxima hold for any step of that shape."""
        batch = AttentionBatch(
            block_tables=self._tables[:rows],
            query_start=self._query_start[: rows + 1],
            context_lens=self._context_lens[:rows],
            slot_mapping=self._slot_mapping[:tokens],
            max_query_len=tokens,
            max_context_len=self._max_context,
        )
        return self._x[:tokens], self._positions[:tokens], batch

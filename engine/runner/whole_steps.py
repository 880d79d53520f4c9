"""WholeSteps: steps that a device repeats by itself, from the plan's rows to drawn tokens.

A decode step of a model on a GPU is some hundred launches, which cost the host as long as they take. They are recorded
once per padded size and kind, in the order in which steps of that kind come, and then replayed with one call: one copy
brings what the step reads of the host, and one takes the drawn tokens away. What is drawn in a way that only some
requests ask for (log probabilities, masks, penalties …) is left to the sampler: the graph ends with the logits then.

Knows the model as a function, rows, and what a row's draw needs. Does not know how a graph is made (`ops.record`), nor
what becomes of results.
"""

from __future__ import annotations

import enum
import logging
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from octavo.engine.runner.buffers import RowArrays
from octavo.engine.runner.device_buffers import DeviceBuffers
from octavo.engine.runner.packed_inputs import pack_into, packed_bytes, unpack
from octavo.kernels.ops import AttentionBatch, Graph, NotRecordable, Ops
from octavo.kernels.sampling import Draws
from octavo.kernels.send import send_into

log = logging.getLogger(__name__)

KVCaches = Sequence[tuple[torch.Tensor, torch.Tensor]]

MAX_TOKENS = 512  # of a recorded step; beyond, launches take less than what they launch
DECODE_SIZES = (1, 2, 4, *range(8, 257, 8), *range(272, MAX_TOKENS + 1, 16))
MIXED_TOKENS = (16, 32, 64, 128, 256)
MIXED_ROWS = (4, 16, 64, 256)
MAX_MIXED = 32  # graphs of steps with chunks; the last used are kept


class Model(Protocol):
    """What is asked of a model here; see octavo.engine.runner.runner."""

    def __call__(
        self, x: torch.Tensor, positions: torch.Tensor, kv: KVCaches, batch: AttentionBatch
    ) -> torch.Tensor: ...

    def local_logits(self, hidden: torch.Tensor) -> torch.Tensor: ...


class Kind(enum.Enum):
    """What a recorded step ends with."""

    HIDDEN = "hidden"  # states for the next stage of a pipeline
    LOGITS = "logits"  # of this rank
    GREEDY = "greedy"  # tokens
    DRAWN = "drawn"  # tokens, some of them drawn from the whole vocabulary
    FILTERED = "filtered"  # tokens, some of them drawn from a part of it


@dataclass(frozen=True, slots=True)
class Shape:
    """Padded. decode: every row is one token, so T = R."""

    tokens: int
    rows: int
    decode: bool
    kind: Kind


class WholeSteps:
    """hidden: (width, dtype) of what a later stage of a pipeline starts from; None = token ids."""

    def __init__(
        self,
        model: Model,
        caches: KVCaches,
        ops: Ops,
        buffers: DeviceBuffers,
        hidden: tuple[int, torch.dtype] | None = None,
    ) -> None:
        self._model, self._caches, self._ops, self._buffers = model, caches, ops, buffers
        self._graphs: dict[Shape, Graph] = {}
        self._seen: set[Shape] = set()
        self._decode_sizes = tuple(sorted({min(size, buffers.max_num_seqs) for size in DECODE_SIZES}))
        self._mixed_rows = tuple(sorted({min(size, buffers.max_num_seqs) for size in MIXED_ROWS}))
        self._is_off = ops.record is None
        device = buffers.device
        most = max(MAX_TOKENS, MIXED_TOKENS[-1])
        self._packed = torch.zeros(packed_bytes(most, most), dtype=torch.uint8, device=device)
        self._drawn = torch.zeros(2, most, dtype=torch.int32, device=device)
        self._outputs: dict[Kind, torch.Tensor] = {}  # that all graphs of a kind share
        self._hidden = None if hidden is None else torch.zeros(most, hidden[0], dtype=hidden[1], device=device)

    @property
    def draws_filtered(self) -> bool:
        """Whether tokens can be drawn in a recorded step, and not only the likeliest taken."""
        return self._ops.draw_rows is not None

    def shape(self, rows: RowArrays, kind: Kind) -> Shape | None:
        """Of the recorded step that does for these rows; None: there is none, and there will be none now."""
        tokens, count = rows.num_tokens, len(rows.slots)
        if self._is_off:
            return None
        if tokens == count:
            size = _at_least(self._decode_sizes, count)
            return None if size is None else Shape(size, size, True, kind)
        padded, among = _at_least(MIXED_TOKENS, tokens), _at_least(self._mixed_rows, count)
        if padded is None or among is None:
            return None
        shape = Shape(padded, among, False, kind)
        if shape in self._seen:
            return shape
        self._seen.add(shape)  # chunks have many shapes: those that come again are recorded
        return None

    def run(
        self, shape: Shape, rows: RowArrays, draws: Draws | None = None, x: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Do the step. Returns what its kind says, padded: hidden states [T, M], logits [R, V of this rank] float32, or
        [2, R] int32: drawn tokens, and the bits of each row's largest logit. Overwritten by the next step. None: it
        turned out that it cannot be recorded, and nothing was done.

        draws: of the rows that are not greedy, whose places its `rows` are. x: [T, M] of a later stage.
        """
        self._send(shape, rows, draws)
        if x is not None:
            assert self._hidden is not None, "the first stage has no hidden states to start from"
            self._hidden[: len(x)] = x
        graph = self._graphs.pop(shape, None)
        if graph is None:
            return self._first(shape)
        self._graphs[shape] = graph  # now the last used
        return graph.replay()

    def _first(self, shape: Shape) -> torch.Tensor | None:
        assert self._ops.record is not None
        try:
            graph, result = self._ops.record(lambda: self._step(shape))
        except NotRecordable as error:
            log.warning("Steps run without graphs: %s.", error)
            self._is_off = True
            return None
        log.debug("recorded a step of %s", shape)
        mixed = [old for old in self._graphs if not old.decode]
        if not shape.decode and len(mixed) >= MAX_MIXED:
            del self._graphs[mixed[0]]
        self._graphs[shape] = graph
        return result

    def _send(self, shape: Shape, rows: RowArrays, draws: Draws | None) -> None:
        """Fill what the recorded step reads. Padded tokens belong to no row and write no KV; padded rows have no
        tokens, and what they draw goes to nobody."""
        buffers = self._buffers
        memory = np.zeros(packed_bytes(shape.tokens, shape.rows), np.uint8)
        packed = pack_into(memory, shape.tokens, shape.rows)
        slot_of, positions, written = rows.per_token()
        tokens, count = len(positions), len(rows.slots)
        index, offsets = np.divmod(positions, buffers.block_size)
        packed.token_at[:tokens] = buffers.token_at(slot_of, positions)
        packed.positions[:tokens] = positions
        packed.table_at[:tokens] = slot_of * buffers.table_width + index
        packed.offsets[:] = -1
        packed.offsets[:tokens] = np.where(written, offsets, -1)
        packed.slots[:] = buffers.nobody
        packed.slots[:count] = rows.slots
        packed.last[:count] = rows.query_start[1:] - 1
        nobody = buffers.nobody * (buffers.max_model_len + 1)
        packed.store_at[:] = nobody
        packed.store_at[:count] = np.where(rows.samples, buffers.token_at(rows.slots, rows.ends), nobody)
        packed.query_start[:] = tokens
        packed.query_start[: count + 1] = rows.query_start
        packed.context_lens[:] = 1
        packed.context_lens[:count] = rows.ends
        edits = buffers.take_edits(shape.rows)
        packed.edit_at[:] = buffers.nobody * buffers.table_width
        packed.edit_at[: edits.shape[1]] = edits[0]
        packed.edit_blocks[: edits.shape[1]] = edits[1]
        packed.greedy[:] = True
        # A row without numbers of its own draws from all tokens, and nobody takes it.
        packed.numbers[:] = _PLAIN[:, None]
        packed.numbers[0] = np.arange(shape.rows)
        if draws is not None:
            packed.greedy[draws.rows] = False
            packed.numbers[:, draws.rows] = draws.numbers()
        send_into(self._packed[: len(memory)], memory)

    def _step(self, shape: Shape) -> torch.Tensor:
        """What is recorded. Reads `_packed` and what lies on the device; the same again if it is done again."""
        inputs, buffers = unpack(self._packed, shape.tokens, shape.rows), self._buffers
        buffers.tables.view(-1).index_copy_(0, inputs.edit_at, inputs.edit_blocks)
        x = self._hidden
        if x is None:
            x = buffers.tokens.view(-1).index_select(0, inputs.token_at).to(torch.int64)
        else:
            x = x[: shape.tokens].clone()  # the model takes it for its own
        batch = AttentionBatch(
            block_tables=buffers.tables.index_select(0, inputs.slots),
            query_start=inputs.query_start,
            context_lens=inputs.context_lens,
            slot_mapping=buffers.slot_mapping(inputs.table_at, inputs.offsets),
            max_query_len=1 if shape.decode else shape.tokens,
            max_context_len=buffers.max_model_len,
        )
        hidden = self._model(x, inputs.positions, self._caches, batch)
        if shape.kind is Kind.HIDDEN:
            return self._shared(shape, hidden)
        logits = self._model.local_logits(hidden if shape.decode else hidden.index_select(0, inputs.last))
        if shape.kind is Kind.LOGITS:
            return self._shared(shape, logits)
        return self._draw(shape, logits.to(torch.float32).contiguous(), inputs)

    def _shared(self, shape: Shape, result: torch.Tensor) -> torch.Tensor:
        """A copy, where results of the kind go: as its result, each graph would keep memory of its own from the others,
        and logits of every size together are gigabytes."""
        kept = self._outputs.get(shape.kind)
        if kept is None:  # in the first call of a recording, which is not captured
            mixed = MIXED_TOKENS if shape.kind is Kind.HIDDEN else self._mixed_rows
            most = max(self._decode_sizes[-1], mixed[-1])
            kept = self._outputs[shape.kind] = result.new_empty(most, result.shape[1])
        return kept[: len(result)].copy_(result)

    def _draw(self, shape: Shape, logits: torch.Tensor, inputs: Any) -> torch.Tensor:
        peaks = self._ops.find_peaks(logits)
        token_ids = peaks.token_ids
        if shape.kind is not Kind.GREEDY:
            assert self._ops.draw_rows is not None
            drawn = self._ops.draw_rows(logits, peaks, inputs.numbers, shape.kind is Kind.FILTERED)
            token_ids = torch.where(inputs.greedy, token_ids, drawn)
        result = self._drawn[:, : shape.rows]
        result[0] = token_ids
        result[1] = peaks.top.view(torch.int32)
        self._buffers.tokens.view(-1).index_copy_(0, inputs.store_at, result[0])
        return result


# Of Draws.numbers: row, scale, the largest gap, top_k, top_p, uniform.
_PLAIN = np.array([0.0, 1.0, np.inf, 2.0**31, 1.0, 0.5])


def _at_least(sizes: Sequence[int], count: int) -> int | None:
    at = bisect_left(sizes, count)
    return sizes[at] if at < len(sizes) else None

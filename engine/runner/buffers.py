"""Buffers: what a rank remembers of each sequence between steps, and how a plan's rows become the model's inputs.

Knows slots, tokens and block tables. Does not know the model or how tokens are drawn. Everything is indexed by slot,
so a plan carries only what changed; making the inputs costs O(tokens of the step), not O(context).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from octavo.engine.core.plan import Row, StepPlan
from octavo.kernels.ops import AttentionBatch

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """A step's inputs. x: what the model starts from, token ids [T] int64; on later stages of a pipeline, hidden states
    [T, M]. positions: [T] int64.

    Of its rows, on the host, [R] int64: slots; last, index in T of the row's last token; ends, the position after that
    one, where a token that is drawn goes.
    """

    x: torch.Tensor
    positions: torch.Tensor
    attention: AttentionBatch
    slots: Ints
    last: Ints
    ends: Ints


@dataclass(frozen=True, slots=True)
class RowArrays:
    """A step's rows, on the host, [R] int64 each. write_from: of a row's tokens, the KV of those before is not written.
    samples: bool. ends: the position after each row's last token, where a token that is drawn goes. query_start:
    [R + 1], first token of each row in the step's.
    """

    slots: Ints
    starts: Ints
    counts: Ints
    write_from: Ints
    samples: npt.NDArray[np.bool_]
    ends: Ints
    query_start: Ints

    @classmethod
    def of(cls, rows: tuple[Row, ...]) -> RowArrays:
        fields = [(row.slot, row.start, row.num_tokens, row.write_from, row.samples) for row in rows]
        slots, starts, counts, write_from, samples = np.array(fields, dtype=np.int64).T.copy()
        query_start = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(counts, out=query_start[1:])
        return cls(slots, starts, counts, write_from, samples.astype(np.bool_), starts + counts, query_start)

    @property
    def num_tokens(self) -> int:
        return int(self.query_start[-1])

    def per_token(self) -> tuple[Ints, Ints, npt.NDArray[np.bool_]]:
        """[T] each: slot, position, whether its KV is written."""
        if self.num_tokens == len(self.slots):
            return self.slots, self.starts, self.starts >= self.write_from
        positions = np.arange(self.num_tokens) + np.repeat(self.starts - self.query_start[:-1], self.counts)
        return np.repeat(self.slots, self.counts), positions, positions >= np.repeat(self.write_from, self.counts)


class Buffers:
    """Per slot: tokens [max_num_seqs, max_model_len + 1] int32 and block table [max_num_seqs, MB] int32, on the host.

    `tokens` is the same memory as a tensor, for the sampler.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int) -> None:
        self._block_size = block_size
        self.max_num_seqs, self.table_width = max_num_seqs, -(-max_model_len // block_size)
        self._tokens = np.zeros((max_num_seqs, max_model_len + 1), dtype=np.int32)
        self._tables = np.zeros((max_num_seqs, self.table_width), dtype=np.int32)
        self._num_prompt = np.zeros(max_num_seqs, dtype=np.int64)
        self.tokens = torch.from_numpy(self._tokens)

    def apply(self, plan: StepPlan) -> None:
        """Take over what the plan says of sequences entering slots, of tokens drawn elsewhere and of block tables."""
        for new in plan.new:
            self._tokens[new.slot, : len(new.token_ids)] = new.token_ids
            self._tables[new.slot, : len(new.blocks)] = new.blocks
            self._num_prompt[new.slot] = new.num_prompt
        if plan.known:
            slots, positions, tokens = np.array(plan.known, dtype=np.int64).T
            self._tokens[slots, positions] = tokens
        if plan.table_edits:
            slots, indices, blocks = np.array(plan.table_edits, dtype=np.int64).T
            self._tables[slots, indices] = blocks

    def inputs(self, rows: RowArrays) -> StepInputs:
        """The model's inputs for these rows, packed in their order."""
        # Every call of numpy or torch counts here: a decode step can be as short as a few hundred of them.
        slots, ends = rows.slots, rows.ends
        slot_of, positions, written = rows.per_token()
        index, offset = np.divmod(positions, self._block_size)
        slot_mapping = self._tables[slot_of, index].astype(np.int64) * self._block_size + offset
        slot_mapping[~written] = -1
        longest = int(ends.max())
        width = -(-longest // self._block_size)
        return StepInputs(
            x=torch.from_numpy(self._tokens[slot_of, positions].astype(np.int64)),
            positions=torch.from_numpy(positions),
            attention=AttentionBatch(
                block_tables=torch.from_numpy(self._tables[slots, :width]),
                query_start=torch.from_numpy(rows.query_start.astype(np.int32)),
                context_lens=torch.from_numpy(ends.astype(np.int32)),
                slot_mapping=torch.from_numpy(slot_mapping),
                max_query_len=int(rows.counts.max()),
                max_context_len=longest,
            ),
            slots=slots,
            last=rows.query_start[1:] - 1,
            ends=ends,
        )

    def num_prompt(self, slot: int) -> int:
        """How many of the slot's tokens are its prompt."""
        return int(self._num_prompt[slot])

    def store(self, slots: Ints, positions: Ints, token_ids: torch.Tensor) -> None:
        """Put drawn tokens [R] where the next step finds them."""
        self._tokens[slots, positions] = token_ids.cpu().numpy()

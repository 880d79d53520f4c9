"""DeviceBuffers: what a rank whose device is not the host remembers of each sequence between steps.

As Buffers, but tokens and block tables lie on the device, where drawn tokens come to be and are needed next: the host
learns them a step later. What a plan changes is sent there; nothing is read back.
"""

from __future__ import annotations

import numpy as np
import torch

from octavo.engine.core.plan import StepPlan
from octavo.engine.runner.buffers import Ints, RowArrays, StepInputs
from octavo.kernels.ops import AttentionBatch
from octavo.kernels.send import send, send_into

NO_EDITS = np.zeros((2, 0), np.int64)


class DeviceBuffers:
    """Per slot, on the device: tokens [max_num_seqs + 1, max_model_len + 1] int32, tables [max_num_seqs + 1, MB] int32.

    The last slot is nobody's: what must be written somewhere and is not wanted goes there; its blocks are 0.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        self.block_size, self.max_model_len, self.device = block_size, max_model_len, device
        self.max_num_seqs, self.table_width = max_num_seqs, -(-max_model_len // block_size)
        self.tokens = torch.zeros(max_num_seqs + 1, max_model_len + 1, dtype=torch.int32, device=device)
        self.tables = torch.zeros(max_num_seqs + 1, self.table_width, dtype=torch.int32, device=device)
        self._num_prompt = np.zeros(max_num_seqs, dtype=np.int64)
        self._edits = NO_EDITS

    @property
    def nobody(self) -> int:
        """The last slot."""
        return self.max_num_seqs

    def apply(self, plan: StepPlan) -> None:
        """Take over what the plan says of sequences entering slots and of tokens drawn elsewhere; table edits wait for
        `take_edits` or `inputs`, whichever the step comes to."""
        for new in plan.new:
            send_into(self.tokens[new.slot, : len(new.token_ids)], np.asarray(new.token_ids, dtype=np.int32))
            if new.blocks:
                send_into(self.tables[new.slot, : len(new.blocks)], np.asarray(new.blocks, dtype=np.int32))
            self._num_prompt[new.slot] = new.num_prompt
        if plan.known:
            slots, positions, tokens = np.array(plan.known, dtype=np.int64).T
            self._put(self.tokens, _last_of_each(np.stack([self.token_at(slots, positions), tokens])))
        if plan.table_edits:
            slots, indices, blocks = np.array(plan.table_edits, dtype=np.int64).T
            self._edits = _last_of_each(np.stack([slots * self.table_width + indices, blocks]))

    def take_edits(self, most: int) -> Ints:
        """[2, N] int64, N <= most: places in the flat tables, and the blocks that go there. The caller puts them there.
        If there are more, they are put there now, and none is returned."""
        if self._edits.shape[1] > most:
            self._put(self.tables, self._edits)
            self._edits = NO_EDITS
        edits, self._edits = self._edits, NO_EDITS
        return edits

    def inputs(self, rows: RowArrays) -> StepInputs:
        """The model's inputs for these rows, packed in their order."""
        self.take_edits(0)
        slot_of, positions, written = rows.per_token()
        index, offset = np.divmod(positions, self.block_size)
        numbers = np.stack([self.token_at(slot_of, positions), positions, slot_of * self.table_width + index])
        token_at, place, table_at = send(numbers, self.device)
        offsets = send(np.where(written, offset, -1), self.device)
        longest = int(rows.ends.max())
        tables = self.tables[:, : -(-longest // self.block_size)].index_select(0, send(rows.slots, self.device))
        return StepInputs(
            x=self.tokens.view(-1).index_select(0, token_at).to(torch.int64),
            positions=place,
            attention=AttentionBatch(
                block_tables=tables,
                query_start=send(rows.query_start.astype(np.int32), self.device),
                context_lens=send(rows.ends.astype(np.int32), self.device),
                slot_mapping=self.slot_mapping(table_at, offsets),
                max_query_len=int(rows.counts.max()),
                max_context_len=longest,
            ),
            slots=rows.slots,
            last=rows.query_start[1:] - 1,
            ends=rows.ends,
        )

    def slot_mapping(self, table_at: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """[T] int64 of places in the flat tables and offsets in their blocks [T]; offset -1: not written."""
        blocks = self.tables.view(-1).index_select(0, table_at)
        # Not torch.where, which would send the -1 to the device as a tensor: a graph cannot.
        return (blocks * self.block_size + offsets).masked_fill_(offsets < 0, -1)

    def token_at(self, slots: Ints, positions: Ints) -> Ints:
        """Places in the flat tokens."""
        return slots * (self.max_model_len + 1) + positions

    def num_prompt(self, slot: int) -> int:
        """How many of the slot's tokens are its prompt."""
        return int(self._num_prompt[slot])

    def store(self, slots: Ints, positions: Ints, token_ids: torch.Tensor) -> None:
        """Put drawn tokens [R] where the next step finds them."""
        at = send(self.token_at(slots, positions), self.device)
        self.tokens.view(-1).index_copy_(0, at, token_ids.to(torch.int32))

    def _put(self, where: torch.Tensor, pairs: Ints) -> None:
        """pairs: [2, N]: places in `where`, and what goes there."""
        places, values = send(pairs, self.device)
        where.view(-1).index_copy_(0, places, values.to(torch.int32))


def _last_of_each(pairs: Ints) -> Ints:
    """pairs: [2, N] places and values. On a device, of several values for a place any could win."""
    places, last = np.unique(pairs[0, ::-1], return_index=True)
    return pairs if len(places) == pairs.shape[1] else pairs[:, ::-1][:, last]

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

    def inputs(self, rows: tuple[Row, ...], device: torch.device) -> StepInputs:
        """The model's inputs for these rows, packed in their order."""
        # Every call of numpy or torch counts here: a decode step can be as short as a few hundred of them.
        slots, starts, counts, write_from = np.array(
            [(row.slot, row.start, row.num_tokens, row.write_from) for row in rows], dtype=np.int64
        ).T.copy()
        ends = starts + counts
        query_start = np.zeros(len(rows) + 1, dtype=np.int32)
        np.cumsum(counts, out=query_start[1:])
        # Of the T tokens.
        slot_of, positions, kept_below = slots, starts, write_from
        longest_query = int(counts.max())
        if longest_query > 1:
            slot_of = np.repeat(slots, counts)
            positions = np.arange(query_start[-1]) + np.repeat(starts - query_start[:-1], counts)
            kept_below = np.repeat(write_from, counts)
        index, offset = np.divmod(positions, self._block_size)
        slot_mapping = self._tables[slot_of, index].astype(np.int64) * self._block_size + offset
        slot_mapping[positions < kept_below] = -1
        longest = int(ends.max())
        width = -(-longest // self._block_size)

        def send(array: npt.NDArray[np.generic]) -> torch.Tensor:
            tensor = torch.from_numpy(array)
            return tensor if device.type == "cpu" else tensor.to(device, non_blocking=True)

        return StepInputs(
            x=send(self._tokens[slot_of, positions].astype(np.int64)),
            positions=send(positions),
            attention=AttentionBatch(
                block_tables=send(self._tables[slots, :width]),
                query_start=send(query_start),
                context_lens=send(ends.astype(np.int32)),
                slot_mapping=send(slot_mapping),
                max_query_len=longest_query,
                max_context_len=longest,
            ),
            slots=slots,
            last=query_start[1:].astype(np.int64) - 1,
            ends=ends,
        )

    def num_prompt(self, slot: int) -> int:
        """How many of the slot's tokens are its prompt."""
        return int(self._num_prompt[slot])

    def store(self, slots: Ints, positions: Ints, token_ids: torch.Tensor) -> None:
        """Put drawn tokens [R] where the next step finds them."""
        self._tokens[slots, positions] = token_ids.cpu().numpy()

"""Draft: a StepPlan in the making, and what has to be remembered of it until its result is in.

Knows sequences and what ranks have to be told of them. Does not know blocks, budgets or who is next.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from octavo.engine.core.plan import NewSequence, Row, StepPlan, TokenMasks
from octavo.engine.core.sequence import Sequence, State


@dataclass(slots=True)
class Draft:
    """One step. Until its result is in it also says whose rows they are."""

    step_id: int
    new: list[NewSequence] = field(default_factory=list)
    table_edits: list[tuple[int, int, int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    known: list[tuple[int, int, int]] = field(default_factory=list)
    sequences: list[Sequence] = field(default_factory=list)  # of the rows
    awaits_masks: bool = False

    def plan(self, released: tuple[int, ...]) -> StepPlan:
        """What the ranks get. released: slots whose sequence left."""
        return StepPlan(
            step_id=self.step_id,
            released=released,
            new=tuple(self.new),
            table_edits=tuple(self.table_edits),
            copies=tuple(self.copies),
            rows=tuple(self.rows),
            known=tuple(self.known),
        )

    def enter(self, sequence: Sequence) -> None:
        """Tell the ranks what is in the sequence's slot from now on."""
        sequence.num_told = len(sequence.tokens)
        if sequence.is_beam:
            sequence.is_forked, sequence.leader = False, None  # the leader goes its own way from now on
        self.new.append(
            NewSequence(
                slot=sequence.slot,
                token_ids=tuple(sequence.tokens),
                num_prompt=sequence.num_prompt,
                params=sequence.params,
                seed=sequence.seed,
                blocks=tuple(sequence.blocks),
                stop_token_ids=tuple(sorted(sequence.stop_token_ids)),
                bad_words_token_ids=sequence.request.bad_words_token_ids,
                pooling=sequence.request.pooling,
            )
        )

    def add_row(self, sequence: Sequence, count: int) -> None:
        """The sequence computes its next `count` tokens."""
        start = sequence.num_computed
        samples = start + count == sequence.num_total and sequence.request.pooling is None
        wants_prompt = sequence.prompt_logprobs is not None and start < sequence.num_prompt - 1
        self.rows.append(
            Row(
                slot=sequence.slot,
                start=start,
                num_tokens=count,
                write_from=sequence.kv_from,
                samples=samples,
                prompt_logprobs=sequence.request.params.prompt_logprobs if wants_prompt else None,
                masked=samples and sequence.constraint is not None,
            )
        )
        self.sequences.append(sequence)
        self.awaits_masks |= self.rows[-1].masked
        if sequence.num_told < len(sequence.tokens):
            told = range(sequence.num_told, len(sequence.tokens))
            self.known.extend((sequence.slot, position, sequence.tokens[position]) for position in told)
            sequence.num_told = len(sequence.tokens)
        sequence.planned_at, sequence.planned_from = self.step_id, start
        sequence.num_computed += count
        sequence.num_pending += samples

    def masks(self, num_bytes: int) -> TokenMasks | None:
        """The masks of the rows, `num_bytes` long, to be asked for once; None as long as a token before one of them is
        not known."""
        masked = [(row, s) for row, s in zip(self.rows, self.sequences, strict=True) if row.masked]
        if any(row.start + row.num_tokens > len(s.tokens) for row, s in masked if s.state is not State.FINISHED):
            return None
        self.awaits_masks = False
        return TokenMasks(self.step_id, tuple(_mask(row, s, num_bytes) for row, s in masked))


def _mask(row: Row, sequence: Sequence, num_bytes: int) -> bytes:
    if sequence.state is State.FINISHED or row.start + row.num_tokens < len(sequence.tokens):
        return b""  # whatever it draws is surplus
    assert sequence.constraint is not None
    return sequence.constraint.mask(num_bytes)

"""Whose turn it is: which running sequences may have a row in the next step. Knows sequences, and pipelines."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

from octavo.engine.core.sequence import Sequence


def whose_turn(running: Seq[Sequence], stages: int) -> Callable[[Sequence], bool]:
    """Of the sequences `running`, in the policy's order, in a pipeline of so many stages.

    In a pipeline a sequence waits for its pending token, and of those that draw a token with every row each step
    takes an equal part, the longest waiting first, so that the other stages have work meanwhile.
    """
    if stages == 1:
        return lambda sequence: sequence.wants_step
    decoding = [s for s in running if s.num_total - s.num_computed <= 1]
    ready = [s for s in decoding if s.wants_step and not s.num_pending]
    ready.sort(key=lambda s: s.planned_at)  # stable: then in the policy's order
    turn = {s.slot for s in ready[: -(-len(decoding) // stages)]}
    behind = {s.slot for s in running if s.wants_step and s.num_total - s.num_computed > 1}
    return lambda sequence: sequence.slot in turn or sequence.slot in behind

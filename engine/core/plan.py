"""The one meeting point of core and runner: a StepPlan goes out, a StepResult comes back.

What there is one of per row is a msgspec.Struct: made, sent and read faster than a frozen dataclass.

Plans are diffs. A rank keeps, per slot, the sequence's tokens, block table and sampling state; a plan says what changed
since the last one and which rows to compute. Plans are executed in the order of their `step_id`. A plan may be launched
before the result of the one before it is known, so a row never carries the token it computes: it names the position,
and the rank finds the token in its own buffer, where the step before has put it. In a pipeline the stage that draws a
token is not the one that needs it first; there a row waits until its token is known, and the plan carries it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import msgspec

from octavo.engine.errors import StepError
from octavo.engine.params import SamplingParams
from octavo.engine.pooling.params import PoolingParams
from octavo.engine.types import TokenLogprobs


@dataclass(frozen=True, slots=True)
class NewSequence:
    """A sequence that enters a slot: admitted for the first time, forked, or resumed after preemption.

    `token_ids`: all its known tokens (prompt, then generated ones). `blocks`: the block table, as far as it goes;
    `table_edits` of the same plan may say some of it again.
    `seed`: 64-bit key of its draws, already unique to the sequence. `stop_token_ids`: every token that would end it
    (the model's end tokens unless ignored, and the request's), masked by the sampler until `params.min_tokens` are out.
    `pooling`: no token is ever drawn; the row that reaches the end of the prompt brings the pooled vector instead.
    """

    slot: int
    token_ids: tuple[int, ...]
    num_prompt: int
    params: SamplingParams
    seed: int
    blocks: tuple[int, ...]
    stop_token_ids: tuple[int, ...] = ()
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    pooling: PoolingParams | None = None


class Row(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A sequence's part of a step: compute positions [start, start + num_tokens).

    `write_from`: KV of positions below it is there already (shared or cached) and must not be written.
    `samples`: the row reaches the newest token, so a token is drawn from its last position; it is stored as the token
    at position start + num_tokens. `prompt_logprobs`: the number of top candidates to return for each of the row's
    positions that predicts a prompt token; None = none. `masked`: the step's TokenMasks say what may be drawn.
    """

    slot: int
    start: int
    num_tokens: int
    write_from: int
    samples: bool
    prompt_logprobs: int | None = None
    masked: bool = False


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step, as every rank of the replica executes it, in the order of the fields.

    `released`: slots whose sequence left. `new`: sequences entering slots. `known`: (slot, position, token) of tokens
    that the rows start from and that were not drawn here: by another stage of the pipeline, or chosen by a beam search
    in place of what was drawn. `table_edits`: (slot, index,
    block) sets one block table entry. `copies`: (source, destination) blocks, copied in all layers before the forward
    (copy-on-write). `rows`: in the order of the policy, at most one per slot; results come back in the same order.
    """

    step_id: int
    released: tuple[int, ...]
    new: tuple[NewSequence, ...]
    table_edits: tuple[tuple[int, int, int], ...]
    copies: tuple[tuple[int, int], ...]
    rows: tuple[Row, ...]
    known: tuple[tuple[int, int, int], ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)


class TokenMasks(msgspec.Struct, frozen=True, array_like=True):
    """What the masked rows of a step may draw, in their order. Known only once the tokens before are, so it comes
    behind the plan, while that is computed.

    Each row is ceil(V / 32) * 4 bytes, token t being bit t % 8 of byte t // 8; or none: everything is allowed.
    """

    step_id: int
    rows: tuple[bytes, ...]


class RowResult(msgspec.Struct, frozen=True, array_like=True):
    """What one row brought: 0, 1 or n tokens, with a TokenLogprobs per token where they were asked for.

    `prompt_logprobs[i]` belongs to the prompt token at position row.start + 1 + i. `error`: no token could be drawn
    (the model's logits are not finite); the sequence ends with it. `pooled`: as TokenDelta has it.
    """

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    error: str | None = None
    pooled: bytes | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """Results in the order of the plan's rows. `seconds`: how long the rank worked on the step. `gap_s`: how long it
    had stood still before, since the end of the last step: the host's doing if the plan was made while that one ran.
    """

    step_id: int
    rows: tuple[RowResult, ...]
    seconds: float = 0.0
    gap_s: float = 0.0


class Pending(Protocol):
    """A step that a rank has begun. Its device may still be at it, while the next one is begun."""

    def wait(self) -> StepResult:
        """To be called once, from any thread. Any exception fails the step, and that step alone, but for RankLost."""


@dataclass(frozen=True, slots=True)
class Computed:
    """A step that was done when it was begun."""

    result: StepResult

    def wait(self) -> StepResult:
        return self.result


class MaskSource(Protocol):
    def take(self, step_id: int) -> TokenMasks:
        """The masks of that step, when they are there. Raises if they never will be. Steps ask in their order."""


class NoMasks:
    """For plans without masked rows."""

    def take(self, step_id: int) -> TokenMasks:
        raise StepError(f"Step {step_id} has masked rows, but no masks come here.")


NO_MASKS = NoMasks()

"""Sequence: one token stream of a request, as the scheduler sees it.

Three counters say all: `num_computed` positions have had their forward planned; `len(tokens)` tokens are known to the
host; `num_pending` more were drawn, or will be, by steps in flight, and are known to the ranks alone. A sequence is to
catch up with `num_total` = known + pending. There are no phases.
"""

from __future__ import annotations

from enum import Enum

from octavo.engine.core.constraints import LEAST_JUMP, Constraint
from octavo.engine.core.policy import Key
from octavo.engine.core.prefix import next_name, root_name
from octavo.engine.types import FinishReason, Request, Resumed, TokenLogprobs


class State(Enum):
    HELD_BACK = "held back"  # a further sample of a request whose prompt is not computed yet
    PARKED = "parked"  # a beam that has nothing to compute, and no blocks (beams.py)
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """Owned by the scheduler; nobody else changes it.

    kv_from:    positions below it have their KV already (prefix hit or fork): they are not written again
    blocks:     block table; covers num_computed positions, never a whole block more
    constraint: what its form allows next; None = it has none
    names:      names of the leading full blocks whose tokens are known
    slot:       place in the ranks' buffers while running, else -1
    leader:     the first sample of the request, whose prompt blocks this one may share; None for that sample itself.
                Of a beam that is to enter: the one it was forked from
    num_shared: of a beam: positions that it has in common with its leader
    params:     what the ranks draw by
    is_beam:    its tokens are chosen by the search of its group, so it takes no step while one is pending
    is_forked:  of a running beam: its slot is to be entered anew, with the tokens and blocks of another
    held_back:  of a leader: the samples that wait until its prompt is computed
    num_told:   tokens of its slot that every stage of the pipeline has; not kept with one stage
    planned_at: number of the newest step with a row of it, which began at position planned_from
    num_given:  tokens known on arrival: the prompt, and what a resumed sequence had generated elsewhere
    num_cached: prompt tokens whose KV was there at the first admission
    """

    __slots__ = (
        "_named",
        "admitted",
        "blocks",
        "constraint",
        "finish_reason",
        "held_back",
        "index",
        "is_beam",
        "is_forked",
        "key",
        "kv_from",
        "leader",
        "max_total",
        "names",
        "num_cached",
        "num_computed",
        "num_given",
        "num_pending",
        "num_prompt",
        "num_shared",
        "num_told",
        "params",
        "planned_at",
        "planned_from",
        "prompt_logprobs",
        "request",
        "seed",
        "slot",
        "state",
        "stop_token_ids",
        "tokens",
    )

    def __init__(
        self,
        request: Request,
        wanted: Resumed,
        key: Key,
        seed: int,
        max_total: int,
        stop_token_ids: frozenset[int],
    ) -> None:
        self.request = request
        self.index = wanted.index
        self.key = key
        self.seed = seed
        self.max_total = max_total
        self.stop_token_ids = stop_token_ids
        self.params = request.params
        self.is_beam = self.is_forked = False
        self.num_shared = 0
        self.leader: Sequence | None = None
        self.held_back: list[Sequence] = []
        self.state = State.WAITING
        self.tokens = list(request.prompt_of(wanted.index))
        self.num_prompt = len(self.tokens)
        self.tokens += wanted.token_ids
        self.num_given = len(self.tokens)
        self.num_computed = 0
        self.num_pending = 0
        self.num_told = 0
        self.planned_at = self.planned_from = 0
        self.kv_from = 0
        self.blocks: list[int] = []
        self.names: list[bytes] = []
        self._named = 0
        self.slot = -1
        self.admitted = False
        self.num_cached = 0
        self.finish_reason: FinishReason | None = None
        self.constraint: Constraint | None = None
        # They travel with the first token: a sequence that is resumed behind one has delivered them.
        scores = request.params.prompt_logprobs is not None and wanted == Resumed(0)
        self.prompt_logprobs: list[TokenLogprobs | None] | None = [None] * self.num_prompt if scores else None

    def join(self, samples: list[Sequence]) -> None:
        """Become one more of a request's samples; the first is the leader."""
        if samples:
            self.leader = samples[0]
            self.leader.held_back.append(self)
            self.state = State.HELD_BACK

    @property
    def num_total(self) -> int:
        return len(self.tokens) + self.num_pending

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def wants_step(self) -> bool:
        """Whether another position can be computed. At max_total the last token is drawn already, known or pending."""
        return self.num_computed < self.num_total < self.max_total and not (self.is_beam and self.num_pending)

    def fork(self, parent: Sequence, token: int) -> None:
        """Become what the beam `parent` is, behind which `token` follows; blocks are the caller's business."""
        self.tokens = [*parent.tokens, token]
        self.names = list(parent.names)

    def share(self, blocks: list[int], num_kv: int, num_shared_full: int) -> None:
        """A running beam that has forked from another goes on with that one's blocks, in its own slot."""
        self.enter(blocks, num_kv, num_shared_full)
        self.is_forked = True

    def has_copies(self, num_kv: int, step: int) -> bool:
        """Whether the KV of the first `num_kv` positions can be copied before `step` computes anything."""
        done = self.planned_from if self.planned_at == step else self.num_computed
        return bool(self.blocks) and done >= num_kv

    def append(self, token: int) -> None:
        """A token became known."""
        self.tokens.append(token)
        if self.constraint is not None:
            self.constraint.follow(token)

    @property
    def may_jump(self) -> bool:
        """Whether tokens that are forced may be had without a draw, and enough of them are there for that to pay. Where
        draws leave a trace (log probabilities, counts for penalties), each must be made."""
        params = self.request.params
        return (
            self.constraint is not None
            and len(self.constraint.forced) >= LEAST_JUMP
            and params.logprobs is None
            and not params.needs_penalties
        )

    def forget_pending(self) -> None:
        """What steps in flight will draw is not wanted: other tokens follow the known ones."""
        self.num_pending = 0
        self.num_computed = min(self.num_computed, len(self.tokens))

    @property
    def reads_cache(self) -> bool:
        """Whether prefix hits may be used. Log probabilities of the prompt need its hidden states, so not for them; nor
        do most ways of pooling."""
        pooling = self.request.pooling
        if pooling is not None:
            return pooling.reads_cache
        skip = self.request.params.skip_reading_prefix_cache
        if skip is None:
            skip = self.prompt_logprobs is not None and self.num_output == 0
        return not skip

    def block_names(self, block_size: int) -> list[bytes]:
        """Names of all full blocks of known tokens. Each is computed once in the sequence's life."""
        names = self.names
        parent = names[-1] if names else root_name(self.request.cache_salt)
        for start in range(len(names) * block_size, len(self.tokens) - block_size + 1, block_size):
            parent = next_name(parent, self.tokens[start : start + block_size])
            names.append(parent)
        return names

    def newly_full(self, block_size: int) -> range:
        """Indices of blocks that are computed, known, and were not returned before (since the last `reset`)."""
        full = min(self.num_computed, len(self.tokens)) // block_size
        fresh = range(self._named, full)
        self._named = max(self._named, full)
        return fresh

    def enter(self, blocks: list[int], num_kv: int, num_shared_full: int) -> None:
        """Start computing with `blocks` that hold the KV of the first `num_kv` positions.

        The newest token is always computed, even when its KV is there: its logits are needed.
        """
        self.blocks = blocks
        self.is_forked = False
        self.kv_from = num_kv
        self.num_computed = min(num_kv, len(self.tokens) - 1)
        self._named = num_shared_full
        self.state = State.RUNNING

    def reset(self) -> None:
        """Forget what is computed (preemption): blocks and slot were given back by the caller."""
        self.blocks = []
        self.num_computed = 0
        self.kv_from = 0
        self.is_forked = False
        self._named = 0
        self.slot = -1
        self.state = State.WAITING

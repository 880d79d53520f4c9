"""Scheduler: which tokens of which sequences the next step computes, and what its result means.

Knows sequences, blocks, slots and budgets. Does not know tensors, text, time or transport. Deterministic: the same
calls give the same plans. One rule covers prefill, chunks, decode, prefix hits and recompute: a sequence has
`num_computed` of `num_total` tokens, and a step lets it catch up within the token budget (the rule is vLLM v1's).

A plan may be made while earlier ones still run: tokens that are drawn but not yet known are counted as pending.
Whatever is freed here may be handed out again in the next plan, because ranks execute plans in order.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import replace

from octavo.engine.core.beams import BeamGroup
from octavo.engine.core.blocks import BlockPool
from octavo.engine.core.budgets import Budget
from octavo.engine.core.constraints import Constraint, Grammar
from octavo.engine.core.draft import Draft
from octavo.engine.core.holdings import Holdings
from octavo.engine.core.limits import Limits
from octavo.engine.core.plan import RowResult, StepPlan, StepResult, TokenMasks
from octavo.engine.core.policy import policy
from octavo.engine.core.queue import WaitingQueue
from octavo.engine.core.seeds import sequence_seed
from octavo.engine.core.sequence import Sequence, State
from octavo.engine.core.turns import whose_turn
from octavo.engine.errors import CapacityError, RequestError
from octavo.engine.types import EngineStats, FinishReason, Request, Resumed, TokenDelta, TokenLogprobs


class Scheduler:
    """Owns all sequences and the block pool of one replica. Called from one thread."""

    def __init__(self, limits: Limits, pool: BlockPool) -> None:
        self.limits = limits
        self.pool = pool
        self.running: list[Sequence] = []  # in the policy's order
        self.admitted: list[str] = []  # requests of which the newest plan has the first row
        self._waiting = WaitingQueue()
        self._requests: dict[str, list[Sequence]] = {}
        self._groups: dict[str, BeamGroup] = {}  # of the requests that are beam searches
        self._launched: deque[Draft] = deque()
        self._key = policy(limits.scheduling_policy)
        self._holdings = Holdings(pool, limits.block_size, limits.max_num_seqs)
        self._step = 0
        self._order = 0
        self._mask_bytes = -(-limits.vocab_size // 32) * 4
        self._num_waiting = 0
        self._waiting_tokens = 0
        self._counters = dict.fromkeys(
            ("steps", "prompt_tokens", "generation_tokens", "prefix_queries", "prefix_hits", "preemptions"), 0
        )

    # ── requests in and out ───────────────────────────────────────────────────────────────────────────────────────

    def add(self, request: Request, grammar: Grammar | None = None) -> list[TokenDelta]:
        """Queue a request, of whose outputs `grammar` says the form. Raises RequestError if it can never run,
        CapacityError if the queue is full.

        Returns the ends of resumed sequences whose tokens so far are all there will be; as a rule none.
        """
        self.check(request)
        self.check_room()
        if request.params.beams is not None:
            self._add_beams(request)
            return []
        live: list[Sequence] = []
        ended: list[TokenDelta] = []
        form = request.params.structured_outputs
        for sequence in self._sequences_of(request, request.sequences):
            error = None
            if grammar is not None and form is not None:
                sequence.constraint = Constraint(grammar, form.begins_after, sequence.tokens[sequence.num_prompt :])
                error = sequence.constraint.error
            reason, stop_reason = self._end_of(sequence) if sequence.num_output else (None, None)
            if error is not None:
                ended.append(self._failed_form(sequence, error))
            elif reason is None:
                if request.pooling is None:
                    sequence.join(live)
                self._count_waiting(sequence, +1)
                live.append(sequence)
            else:
                end = TokenDelta(request.request_id, sequence.index, (), finish_reason=reason, stop_reason=stop_reason)
                ended.append(replace(end, form_complete=self._is_form_complete(sequence, reason)))
        if live:
            self._requests[request.request_id] = live
            for sequence in live if request.pooling is not None else live[:1]:
                self._waiting.push(sequence)
        return ended

    def _add_beams(self, request: Request) -> None:
        """A search has as many members as it is wide; the first computes the prompt. What another engine had of it is
        of no use: a search is deterministic, and nothing of it is told before its end."""
        assert request.params.beams is not None
        members = list(self._sequences_of(request, tuple(map(Resumed, range(request.params.beams.width)))))
        self._groups[request.request_id] = BeamGroup(request, members, self.limits.eos_token_ids)
        self._requests[request.request_id] = members
        for member in members[1:]:
            member.state, member.admitted = State.PARKED, True
        self._count_waiting(members[0], +1)
        self._waiting.push(members[0])

    def _sequences_of(self, request: Request, wanted_ones: Seq[Resumed]) -> Iterator[Sequence]:
        params = request.params
        stops = self.limits.stops_of(params)
        longest = self.limits.max_model_len
        for wanted in wanted_ones:
            num_prompt = len(request.prompt_of(wanted.index))
            max_total = longest if params.max_tokens is None else min(longest, num_prompt + params.max_tokens)
            if request.pooling is not None:
                max_total = num_prompt + 1  # of which the last is never drawn
            self._order += 1
            key = self._key(request.priority, self._step, self._order)
            seed = sequence_seed(params.seed or 0, wanted.index)
            yield Sequence(request, wanted, key, seed, max_total, stops)

    def check(self, request: Request) -> None:
        """Raise RequestError if the request can never run here."""
        if request.request_id in self._requests:
            raise RequestError(f"request_id {request.request_id!r} is in use by a running request.", "request_id")
        self.limits.check(request)

    def check_room(self, on_the_way: int = 0) -> None:
        """Raise CapacityError if the queue is full, with sequences that are `on_the_way`. An idle engine has room."""
        limit, waiting = self.limits.max_num_queued_reqs, self._num_waiting + on_the_way
        if limit is not None and waiting >= max(1, limit):
            raise CapacityError(f"The queue is full: {waiting} sequences wait, the limit is {limit}.")

    def is_live(self, request_id: str) -> bool:
        """Whether any sequence of the request is not finished."""
        return request_id in self._requests

    def abort(self, request_id: str) -> list[TokenDelta]:
        """End all sequences of a request; their blocks are free at once. Unknown ids are ignored."""
        return [
            delta
            for sequence in list(self._requests.get(request_id, ()))
            if sequence.state is not State.FINISHED
            for delta in self._finished(sequence, "abort")
        ]

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self.running),
            num_waiting=self._num_waiting,
            waiting_tokens=self._waiting_tokens,
            kv_blocks_total=self.pool.total,
            kv_blocks_held=self.pool.num_held,
            kv_blocks_cached=self.pool.num_cached,
            prefill_tokens=sum([s.num_prompt - s.num_computed for s in self.running if s.num_computed < s.num_prompt]),
            **self._counters,
        )

    # ── a step is planned ─────────────────────────────────────────────────────────────────────────────────────────

    def schedule(self) -> StepPlan | None:
        """Plan the next step; None if nothing can be computed before a result comes in (or at all)."""
        self._step += 1
        self.admitted.clear()
        draft = Draft(self._step)
        tokens = Budget(self.limits.max_num_batched_tokens)
        if not self._continue_running(draft, tokens):
            self._admit_waiting(draft, tokens)
        while not draft.rows and not self._launched and self._num_waiting and self.running:
            # Only beams can stand still: they wait for others of their group that find no room. The last gives way.
            self._preempt(self.running.pop())
            self._admit_waiting(draft, tokens)
        if not draft.rows:
            return None
        self._launched.append(draft)
        return draft.plan(self._holdings.take_released())

    def _continue_running(self, draft: Draft, tokens: Budget) -> bool:
        """Let running sequences catch up, in order. Returns whether any had to be preempted."""
        preempted = False
        wants_step = whose_turn(self.running, self.limits.stages)
        later = sum(wants_step(sequence) for sequence in self.running)  # each of these is left one token
        position = 0
        while position < len(self.running):
            sequence = self.running[position]
            position += 1
            if not wants_step(sequence):
                continue
            later -= 1
            count = self._chunk(sequence.num_total - sequence.num_computed, tokens.left - later)
            while count and not self._holdings.extend(sequence, count, draft):
                # The last in the policy's order gives way. It has no row in this draft: rows are made in the same
                # order.
                victim = self.running.pop()
                later -= victim is not sequence and wants_step(victim)
                self._preempt(victim)
                preempted = True
                if victim is sequence:
                    count = 0
            if count:
                if sequence.is_forked:
                    self._holdings.release_slot(sequence.slot)
                    draft.enter(sequence)
                self._add_row(sequence, count, draft, tokens)
        return preempted

    def _admit_waiting(self, draft: Draft, tokens: Budget) -> None:
        """Admit waiting sequences in order until one does not fit: nobody overtakes it, so it cannot starve."""
        blocks = Budget(max(0, self.pool.available - self._holdings.promised(self.running)))
        not_yet: list[Sequence] = []
        while tokens.left and self._holdings.free_slots and (sequence := self._waiting.pop()) is not None:
            if (
                sequence.num_pending
            ):  # preempted with a token in flight: it must be known before it is sent to a slot again
                not_yet.append(sequence)
                continue
            if not self._admit(sequence, draft, tokens, blocks):
                not_yet.append(sequence)
                break
        for sequence in not_yet:
            self._waiting.push(sequence)

    def _admit(self, sequence: Sequence, draft: Draft, tokens: Budget, blocks: Budget) -> bool:
        """Give the sequence a slot, the blocks others have for it, and a first row, if all of its prompt fits."""
        shared, num_kv = self._holdings.find(sequence, self._step)
        known = len(sequence.tokens)
        count = self._chunk(known - min(num_kv, known - 1), tokens.left)
        copy_on_write = num_kv % self.limits.block_size != 0
        fresh = self._holdings.blocks_for(known) - len(shared) + copy_on_write
        wanted = fresh + sum(self.pool.is_cached(block) for block in shared)
        # Some room is kept for those who run, lest the newcomer be preempted at once.
        reserve = min(len(self.running), self.pool.total // 64)
        if not count or not blocks.fits(wanted + reserve):
            return False
        blocks.take(wanted)
        self._holdings.enter(sequence, shared, num_kv)
        self._count_waiting(sequence, -1)
        insort(self.running, sequence, key=lambda s: s.key)
        if not sequence.admitted:
            sequence.admitted = True
            sequence.num_cached = min(num_kv, sequence.num_prompt)
            if sequence.leader is None:
                self.admitted.append(sequence.request.request_id)
                self._counters["prefix_queries"] += known
                self._counters["prefix_hits"] += num_kv
                self._counters["prompt_tokens"] += sequence.num_prompt
        extended = self._holdings.extend(sequence, count, draft)
        assert extended, f"{wanted} blocks were promised of {self.pool.available}"
        draft.enter(sequence)
        self._add_row(sequence, count, draft, tokens)
        return True

    def _add_row(self, sequence: Sequence, count: int, draft: Draft, tokens: Budget) -> None:
        tokens.take(count)
        draft.add_row(sequence, count)
        self._holdings.name_blocks(sequence)
        if sequence.held_back and sequence.num_computed >= sequence.num_prompt:
            for sample in sequence.held_back:
                sample.state = State.WAITING
                self._waiting.push(sample)
            sequence.held_back = []

    def _preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks and slot; it waits again, in its old place, and recomputes."""
        self._holdings.give_back(sequence)
        sequence.reset()
        self._counters["preemptions"] += 1
        if sequence.is_beam and self._groups[sequence.request.request_id].has_scores(sequence):
            sequence.state = State.PARKED
        else:
            self._wait(sequence)

    def _wait(self, sequence: Sequence) -> None:
        sequence.state = State.WAITING
        self._count_waiting(sequence, +1)
        self._waiting.push(sequence)

    # ── a result comes in ─────────────────────────────────────────────────────────────────────────────────────────

    def commit(self, result: StepResult) -> list[TokenDelta]:
        """Take the oldest launched step's result: tokens become known, sequences end."""
        draft = self._launched.popleft()
        assert draft.step_id == result.step_id, f"result of step {result.step_id}, expected {draft.step_id}"
        assert len(draft.rows) == len(result.rows), f"{len(result.rows)} results for {len(draft.rows)} rows"
        self._counters["steps"] += 1
        deltas = []
        for sequence, row, got in zip(draft.sequences, draft.rows, result.rows, strict=True):
            if sequence.state is State.FINISHED:
                continue  # ended after this step was planned: its tokens are surplus
            if row.samples:
                if row.start + row.num_tokens < len(sequence.tokens):
                    continue  # its token was forced meanwhile: what was drawn for it is surplus
                sequence.num_pending -= 1
            if sequence.prompt_logprobs is not None:
                at = row.start + 1
                sequence.prompt_logprobs[at : at + len(got.prompt_logprobs)] = got.prompt_logprobs
            if got.error is not None:
                deltas.extend(self._finished(sequence, "error", error=got.error))
            elif sequence.is_beam and got.token_ids:
                deltas.extend(self._take_scores(sequence, got.logprobs[0]))
            elif got.pooled is not None:
                deltas.append(replace(self._finished_delta(sequence, "stop"), pooled=got.pooled))
            elif got.token_ids:
                deltas.append(self._take_tokens(sequence, got))
        return deltas

    def due_masks(self) -> Iterator[TokenMasks]:
        """The masks of launched steps, in their order, as far as the tokens before them are known. Each comes once; a
        step's are due at the latest when the step before it has been committed or has failed."""
        for draft in self._launched:
            if draft.awaits_masks:
                masks = draft.masks(self._mask_bytes)
                if masks is None:
                    return
                yield masks

    def fail(self, message: str) -> list[TokenDelta]:
        """The oldest launched step failed: its sequences end with an error, the others go on."""
        draft = self._launched.popleft()
        self.pool.forget_names()  # blocks were named when they were planned, and may hold anything now
        return [
            delta
            for sequence in draft.sequences
            if sequence.state is not State.FINISHED
            for delta in self._finished(sequence, "error", error=message)
        ]

    def _take_tokens(self, sequence: Sequence, got: RowResult) -> TokenDelta:
        first = sequence.num_output == 0
        begin = len(sequence.tokens)
        reason: FinishReason | None = None
        stop_reason: int | None = None
        for token in self._with_forced(sequence, got.token_ids):
            sequence.append(token)
            reason, stop_reason = self._end_of(sequence)
            if reason:
                break
        count = len(sequence.tokens) - begin
        error = sequence.constraint.error if sequence.constraint is not None else None
        if error is not None:
            reason, stop_reason = "error", None
        self._counters["generation_tokens"] += count
        self._holdings.name_blocks(sequence)
        prompt_logprobs = sequence.prompt_logprobs if first else None
        delta = TokenDelta(
            request_id=sequence.request.request_id,
            index=sequence.index,
            token_ids=tuple(sequence.tokens[begin:]),
            logprobs=got.logprobs[:count],
            finish_reason=reason,
            stop_reason=stop_reason,
            num_cached_tokens=sequence.num_cached,
            prompt_logprobs=None if prompt_logprobs is None else tuple(prompt_logprobs),
            error=error,
            form_complete=self._is_form_complete(sequence, reason),
            error_param=None if error is None else "structured_outputs",
        )
        if reason:
            self._finish(sequence, reason)
        return delta

    def _with_forced(self, sequence: Sequence, drawn: Seq[int]) -> Iterator[int]:
        """The drawn tokens, each to be appended before the next is asked for, and those that are forced behind them."""
        yield from drawn
        if self.limits.stages == 1 and not sequence.is_beam:
            sequence.num_told = len(sequence.tokens)  # the rank that drew them is the one that needs them
        if sequence.may_jump:
            assert sequence.constraint is not None
            sequence.forget_pending()
            self._holdings.trim(sequence)
            while sequence.constraint.forced:
                yield sequence.constraint.forced[0]

    def _end_of(self, sequence: Sequence) -> tuple[FinishReason | None, int | None]:
        """Whether the newest token ends the sequence: (finish reason, stop reason)."""
        token, params = sequence.tokens[-1], sequence.request.params
        if token in sequence.stop_token_ids and sequence.num_output >= params.min_tokens:
            own_stop = token not in self.limits.eos_token_ids or params.ignore_eos
            return "stop", token if own_stop else None
        if sequence.constraint is not None and sequence.constraint.ended:
            return "stop", None
        return ("length" if len(sequence.tokens) >= sequence.max_total else None), None

    def _is_form_complete(self, sequence: Sequence, reason: FinishReason | None) -> bool:
        return reason == "stop" and sequence.tokens[-1] not in sequence.stop_token_ids

    def _failed_form(self, sequence: Sequence, error: str) -> TokenDelta:
        delta = TokenDelta(sequence.request.request_id, sequence.index, (), finish_reason="error")
        return replace(delta, error=error, error_param="structured_outputs")

    def _finished(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> list[TokenDelta]:
        """End a sequence; of a beam search, all of it."""
        if sequence.is_beam:
            group = self._groups[sequence.request.request_id]
            self._end_group(group, reason)
            return group.ends(reason, error)
        return [self._finished_delta(sequence, reason, error)]

    def _finished_delta(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> TokenDelta:
        self._finish(sequence, reason)
        return TokenDelta(
            sequence.request.request_id,
            sequence.index,
            (),
            finish_reason=reason,
            num_cached_tokens=sequence.num_cached,
            error=error,
        )

    # ── beam search ───────────────────────────────────────────────────────────────────────────────────────────────

    def _take_scores(self, member: Sequence, scores: TokenLogprobs) -> list[TokenDelta]:
        """The scores of a beam's next token came; with the last ones of its group, all its beams go on."""
        if member.state is State.WAITING:  # it was preempted meanwhile
            member.state = State.PARKED
            self._count_waiting(member, -1)
        group = self._groups[member.request.request_id]
        if not group.take(member, scores):
            return []
        keepers, takers, idle = group.advance()
        if group.search.done:
            deltas = group.deltas()
            self._counters["generation_tokens"] += sum(len(delta.token_ids) for delta in deltas)
            self._end_group(group, "stop")
            return deltas
        for move in takers:  # first: what they copy is the parent without its next token
            self._fork(move.member, move.parent, move.token)
        for move in keepers:
            move.member.tokens.append(move.token)
            if move.member.state is State.PARKED:
                move.member.leader = None
                self._wait(move.member)
            else:
                self._holdings.name_blocks(move.member)
        for member in idle:
            if member.state is State.RUNNING:
                self._preempt_idle(member)
        return []

    def _fork(self, member: Sequence, parent: Sequence, token: int) -> None:
        known = len(parent.tokens)
        member.fork(parent, token)
        if parent.blocks and member.state is State.RUNNING:
            self._holdings.fork(member, parent, known)
            return
        if member.state is State.RUNNING:
            self._preempt_idle(member)
        member.leader, member.num_shared = parent, known
        self._wait(member)

    def _preempt_idle(self, member: Sequence) -> None:
        self.running.remove(member)
        self._holdings.give_back(member)
        member.reset()
        member.state = State.PARKED

    def _end_group(self, group: BeamGroup, reason: FinishReason) -> None:
        for member in group.members:
            if member.state is State.PARKED:
                member.state, member.finish_reason = State.FINISHED, reason
            elif member.state is not State.FINISHED:
                self._finish(member, reason)
        request_id = group.members[0].request.request_id
        self._requests.pop(request_id, None)
        self._groups.pop(request_id, None)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        if sequence.state is State.RUNNING:
            self.running.remove(sequence)
            self._holdings.give_back(sequence)
        else:
            self._count_waiting(sequence, -1)
        sequence.state = State.FINISHED
        sequence.finish_reason = reason
        for sample in sequence.held_back:  # the leader ended early (an error): its prompt is theirs to compute
            if sample.state is State.HELD_BACK:
                sample.state = State.WAITING
                self._waiting.push(sample)
        sequence.held_back = []
        request_id = sequence.request.request_id
        if all(s.state is State.FINISHED for s in self._requests[request_id]):
            del self._requests[request_id]

    # ── small helpers ─────────────────────────────────────────────────────────────────────────────────────────────

    def _chunk(self, remaining: int, left: int) -> int:
        """How many of `remaining` tokens a row may compute within `left` tokens of budget."""
        count = min(remaining, left)
        if not self.limits.enable_chunked_prefill:
            return count if count == remaining else 0
        if self.limits.long_prefill_token_threshold:
            count = min(count, self.limits.long_prefill_token_threshold)
        return max(0, count)

    def _count_waiting(self, sequence: Sequence, change: int) -> None:
        self._num_waiting += change
        self._waiting_tokens += change * sequence.num_given


def waste(sequences: Seq[Sequence], block_size: int) -> tuple[int, int]:
    """(allocated but unused slots, allocated slots) of running sequences: the KV waste that paging is to keep low."""
    allocated = sum(len(s.blocks) * block_size for s in sequences)
    used = sum(min(s.num_computed, len(s.blocks) * block_size) for s in sequences)
    return allocated - used, allocated

"""What the sampler remembers about each sequence while it holds a slot.

Per slot: its parameters, as host arrays that a step gathers by slot; its token lists (bias, masks, bad words), as
device tensors made once at entry; and, only for slots with penalties, counts of the tokens it has put out, kept on the
device. Knows NewSequence and tensors. Does not know logits.

Costs: O(tokens) once when a sequence enters; per step O(rows), but for penalties, which visit the distinct tokens they
change (never more than the vocabulary, which every step reads anyway).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from octavo.engine.core.plan import NewSequence
from octavo.engine.params import SamplingParams
from octavo.engine.runner.philox import Ahead
from octavo.kernels import ref
from octavo.kernels.ops import ApplyPenalties, CountTokens
from octavo.kernels.sampling import Draws, Penalised, Tallies
from octavo.kernels.send import send

Ints = npt.NDArray[np.int64]

NO_LOGPROBS = -2
# 1 / temperature stays a normal float32, so that it times an infinite distance is infinite and not NaN.
_MAX_TEMPERATURE = 1e30
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class BadWords:
    """A slot's forbidden token sequences: `last` may not follow `prefix`. Shapes for N sequences, longest prefix W.

    last: [N] int64. back: [N, W] int64, how far before the drawn position each prefix token stands (1 = just before).
    want: [N, W] int64, the prefix tokens. Unused entries: back 0, want -1. lengths: [N] host, length of each prefix.
    """

    last: torch.Tensor
    back: torch.Tensor
    want: torch.Tensor
    lengths: Ints


@dataclass(frozen=True, slots=True)
class Rows:
    """The state of a step's rows, gathered for it. Host arrays [R]."""

    slots: Ints
    positions: Ints
    num_output: Ints  # tokens generated before this draw
    greedy: npt.NDArray[np.bool_]
    logprobs: Ints  # NO_LOGPROBS, -1 = whole vocabulary, else k


class SamplingState:
    """Sampling state of every slot of one rank. Written by the runner: `enter`, `leave`; by the sampler:
    `penalties.count`.

    A slot's counts live on the device and follow the order of launches, so nothing here waits for the device. ops:
    that counting and penalties go by.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_model_len: int,
        vocab_size: int,
        device: torch.device,
        ops: PenaltyOps = ref,
    ) -> None:
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self._num_prompt = np.zeros(max_num_seqs, np.int64)
        self._min_tokens = np.zeros(max_num_seqs, np.int64)
        self._greedy = np.ones(max_num_seqs, np.bool_)
        self._temperature = np.ones(max_num_seqs, np.float64)
        self._top_k = np.full(max_num_seqs, vocab_size, np.int64)  # vocabulary size = all
        self._top_p = np.ones(max_num_seqs, np.float64)
        self._min_p = np.zeros(max_num_seqs, np.float64)
        self._seeds = np.zeros(max_num_seqs, np.uint64)
        self._uniforms = Ahead(max_num_seqs)
        self._logprobs = np.full(max_num_seqs, NO_LOGPROBS, np.int64)
        self.allowed: dict[int, torch.Tensor] = {}  # slot → token ids [N]
        self.bad_words: dict[int, BadWords] = {}
        self.stops: dict[int, torch.Tensor] = {}  # only slots with min_tokens
        self.bias: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # slot → token ids [N], biases [N] float32
        self.candidates: dict[int, torch.Tensor] = {}  # slot → token ids [N] whose log probabilities are wanted
        self.penalties = Penalties(vocab_size, self.device, ops)

    def enter(self, new: NewSequence) -> None:
        """A sequence enters `new.slot`; whatever was there is forgotten. O(len(new.token_ids)).

        Token ids outside the vocabulary are left out: they can neither be drawn nor masked.
        """
        self.leave(new.slot)
        slot, params = new.slot, new.params
        self._num_prompt[slot] = new.num_prompt
        self._min_tokens[slot] = min(params.min_tokens, _INT32_MAX)
        self._greedy[slot] = params.greedy
        self._temperature[slot] = 1.0 if params.greedy else min(params.temperature, _MAX_TEMPERATURE)
        self._top_k[slot] = min(params.top_k, self.vocab_size) or self.vocab_size
        self._top_p[slot] = params.top_p
        self._min_p[slot] = params.min_p
        self._seeds[slot] = new.seed & (2**64 - 1)
        self._logprobs[slot] = NO_LOGPROBS if params.logprobs is None else params.logprobs
        if params.logprob_token_ids:
            self.candidates[slot] = send(self._ids(params.logprob_token_ids), self.device)
        if params.allowed_token_ids:
            self.allowed[slot] = send(self._ids(params.allowed_token_ids), self.device)
        if params.min_tokens > 0 and new.stop_token_ids:
            self.stops[slot] = send(self._ids(new.stop_token_ids), self.device)
        if params.logit_bias:
            ids = self._ids(tuple(params.logit_bias))
            values = np.array([params.logit_bias[token] for token in ids.tolist()], np.float32)
            self.bias[slot] = (send(ids, self.device), send(values, self.device))
        words = [w for w in new.bad_words_token_ids if w and all(0 <= token < self.vocab_size for token in w)]
        if words:
            self.bad_words[slot] = self._words(words)
        if params.needs_penalties:
            self.penalties.enter(slot, params, new.token_ids[: new.num_prompt], new.token_ids[new.num_prompt :])

    def leave(self, slot: int) -> None:
        """The slot's sequence is gone. Leaving an empty slot is allowed."""
        self._greedy[slot] = True
        self._logprobs[slot] = NO_LOGPROBS
        self._uniforms.forget(slot)
        for lists in (self.allowed, self.bad_words, self.stops, self.bias, self.candidates):
            lists.pop(slot, None)
        self.penalties.leave(slot)

    def rows(self, slots: Sequence[int] | Ints, positions: Sequence[int] | Ints) -> Rows:
        """Gather the state of `slots` [R], which draw the tokens at `positions` [R]."""
        at, place = np.asarray(slots, np.int64), np.asarray(positions, np.int64)
        return Rows(
            slots=at,
            positions=place,
            num_output=place - self._num_prompt[at],
            greedy=self._greedy[at],
            logprobs=self._logprobs[at],
        )

    def draws(self, rows: Rows, which: Ints) -> Draws:
        """How the rows `which` [N] are drawn."""
        at = rows.slots[which]
        return Draws(
            rows=which,
            temperature=self._temperature[at],
            top_k=self._top_k[at],
            top_p=self._top_p[at],
            min_p=self._min_p[at],
            uniforms=self._uniforms.take(at, self._seeds[at], rows.positions[which]),
        )

    def top_k(self, rows: Rows) -> Ints:
        """[R]: the most likely tokens a row is drawn from; the vocabulary size = all."""
        return self._top_k[rows.slots]

    def edits(self, rows: Rows) -> npt.NDArray[np.bool_]:
        """[R]: masks, bias or penalties may change the row's logits in this step."""
        kept = (self.allowed, self.bad_words, self.bias, self.penalties)
        found = np.zeros(len(rows.slots), np.bool_)
        if any(kept):
            found[:] = [any(slot in each for each in kept) for slot in rows.slots.tolist()]
        if self.stops:
            found |= np.array([slot in self.stops for slot in rows.slots.tolist()]) & self.below_min_tokens(rows)
        return found

    def below_min_tokens(self, rows: Rows) -> npt.NDArray[np.bool_]:
        """[R]: the row has not yet put out its min_tokens."""
        return rows.num_output < self._min_tokens[rows.slots]

    def _ids(self, tokens: Sequence[int]) -> Ints:
        """Ascending. Duplicates go, so that a later scatter writes every place once."""
        return np.array(sorted({token for token in tokens if 0 <= token < self.vocab_size}), np.int64)

    def _words(self, words: Sequence[tuple[int, ...]]) -> BadWords:
        width = max(len(word) for word in words) - 1
        back = np.zeros((len(words), width), np.int64)
        want = np.full((len(words), width), -1, np.int64)
        for i, word in enumerate(words):
            prefix = word[:-1]
            back[i, : len(prefix)] = np.arange(len(prefix), 0, -1)
            want[i, : len(prefix)] = prefix
        return BadWords(
            last=send(np.array([word[-1] for word in words], np.int64), self.device),
            back=send(back, self.device),
            want=send(want, self.device),
            lengths=np.array([len(word) - 1 for word in words], np.int64),
        )


class PenaltyOps(Protocol):
    """The ops that `Penalties` calls: octavo.kernels.ops.Ops has them."""

    @property
    def apply_penalties(self) -> ApplyPenalties: ...
    @property
    def count_tokens(self) -> CountTokens: ...


class Penalties:
    """Tallies of the slots that use penalties, each at a place of its own. Storage grows with the number of such
    slots, and with the longest list."""

    def __init__(self, vocab_size: int, device: torch.device, ops: PenaltyOps = ref) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._ops = ops
        self._place: dict[int, int] = {}  # slot → p
        self._free: list[int] = []
        self._tallies = Tallies(
            counts=torch.zeros((0, vocab_size), dtype=torch.int32, device=device),
            known=torch.zeros((0, vocab_size), dtype=torch.bool, device=device),
            seen=torch.zeros((0, 256), dtype=torch.int64, device=device),
            num_seen=torch.zeros(0, dtype=torch.int64, device=device),
        )
        # What the host knows without asking the device: a bound on each list's length, and the parameters.
        self._bound = np.zeros(0, np.int64)
        self._factors = np.ones((0, 3), np.float32)  # repetition, frequency, presence

    def __contains__(self, slot: int) -> bool:
        return slot in self._place

    def __bool__(self) -> bool:
        return bool(self._place)

    def enter(self, slot: int, params: SamplingParams, prompt: Sequence[int], output: Sequence[int]) -> None:
        """Start counting for a slot. `output`: tokens already generated (the sequence was preempted, or forked)."""
        counted, listed = self._valid(output), self._valid(prompt if params.repetition_penalty != 1 else ())
        listed = np.unique(np.concatenate([listed, counted]))
        if not self._free:
            self._add_places()
        self._widen(len(listed) + 1)
        place = self._free.pop()
        self._place[slot] = place
        self._bound[place] = len(listed)
        self._factors[place] = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        ids, times = (send(x, self._device) for x in np.unique(counted, return_counts=True))
        tallies = self._tallies
        tallies.counts[place] = 0
        tallies.counts[place, ids] = times.to(torch.int32)
        ids = send(listed, self._device)
        tallies.known[place] = False
        tallies.known[place, ids] = True
        tallies.seen[place, : len(listed)] = ids
        tallies.num_seen[place] = len(listed)

    def leave(self, slot: int) -> None:
        place = self._place.pop(slot, None)
        if place is not None:
            self._free.append(place)

    def apply(self, logits: torch.Tensor, rows: Ints, slots: Ints) -> None:
        """Penalise logits [R, V] float32 in place at `rows` [N], whose `slots` [N] all are in here."""
        places = self._places(slots)
        repetition, frequency, presence = np.ascontiguousarray(self._factors[places].T)
        longest = int(self._bound[places].max(initial=0))
        penalised = Penalised(rows, places, repetition, frequency, presence, longest)
        self._ops.apply_penalties(logits, self._tallies, penalised)

    def count(self, slots: Ints, rows: Ints, token_ids: torch.Tensor) -> None:
        """Count the drawn tokens token_ids[rows] for `slots` [N], which all are in here. On the device, without a
        wait.
        """
        places = self._places(slots)
        self._widen(int(self._bound[places].max(initial=0)) + 1)
        self._bound[places] = np.minimum(self._bound[places] + 1, self._vocab_size)
        self._ops.count_tokens(self._tallies, places, rows, token_ids)

    def _places(self, slots: Ints) -> Ints:
        return np.array([self._place[slot] for slot in slots.tolist()], np.int64)

    def _valid(self, tokens: Sequence[int]) -> Ints:
        ids = np.asarray(tokens, np.int64)
        return ids[(ids >= 0) & (ids < self._vocab_size)]

    def _add_places(self) -> None:
        old = len(self._tallies.num_seen)
        more = max(4, old)
        names = ("counts", "known", "seen", "num_seen")
        longer = {name: _longer(getattr(self._tallies, name), 0, more) for name in names}
        self._tallies = Tallies(**longer)
        self._bound = np.concatenate([self._bound, np.zeros(more, np.int64)])
        self._factors = np.concatenate([self._factors, np.ones((more, 3), np.float32)])
        self._free.extend(range(old + more - 1, old - 1, -1))

    def _widen(self, width: int) -> None:
        """Make room for lists of `width`; doubles, but no list is longer than the vocabulary and one."""
        seen = self._tallies.seen
        have = seen.shape[1]
        if width > have:
            more = max(width, min(2 * have, self._vocab_size + 1)) - have
            self._tallies = replace(self._tallies, seen=_longer(seen, 1, more))


def _longer(x: torch.Tensor, dim: int, more: int) -> torch.Tensor:
    shape = list(x.shape)
    shape[dim] = more
    return torch.cat([x, x.new_zeros(shape)], dim=dim)

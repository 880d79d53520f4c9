"""The sampler of one rank: a step's logits in, one token per row out, all rows at once.

The order is vLLM's: log probabilities from the raw logits; what the form of the output allows (masks from the core);
allowed tokens; bad words; min_tokens; logit bias;
penalties; then the greedy choice, or temperature, min_p, top_k, top_p and the draw. A stage no row of the step needs
is not entered, which the host knows from the slots' state without asking the device. What reads whole rows of logits
is an op (octavo.kernels.ops).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np
import torch

from octavo.engine.core.plan import RowResult
from octavo.engine.runner.in_flight import HostCopies
from octavo.engine.runner.logprobs import to_token_logprobs
from octavo.engine.runner.sampling_state import NO_LOGPROBS, Ints, Rows, SamplingState
from octavo.engine.types import TokenLogprobs
from octavo.kernels.ops import Ops
from octavo.kernels.sampling import Logprobs, Masks, Peaks
from octavo.kernels.send import send

_NOT_FINITE = "The model's logits are not finite numbers."
_MASKS = "structured_outputs, allowed_token_ids, bad_words, min_tokens"
_NOTHING_LEFT = f"No token is left to draw: the masks ({_MASKS}) exclude them all."


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """What `Sampler.sample` gives. token_ids: [R] int64 on the device, ready for the next step at once.

    The copies to the host are under way; `to_host` waits for them, but not for work launched later.
    """

    token_ids: torch.Tensor
    _taken: tuple[_Taken, ...]
    _copies: HostCopies = field(repr=False)

    def to_host(self) -> tuple[RowResult, ...]:
        """One result per row. A row that could not be drawn from has no token, but an `error`: one sentence."""
        copies = iter(self._copies.wait())
        token_ids, tops = next(copies).tolist(), next(copies).tolist()
        logprobs: dict[int, TokenLogprobs] = {}
        for taken in self._taken:
            parts = tuple(next(copies) for _ in taken.logprobs.parts())
            logprobs.update(zip(taken.rows, to_token_logprobs(parts, taken.ks), strict=True))
        return row_results(token_ids, tops, logprobs)


def row_results(
    token_ids: list[int], tops: list[float], logprobs: Mapping[int, TokenLogprobs] = MappingProxyType({})
) -> tuple[RowResult, ...]:
    """One per row. tops: each row's largest logit, after what was done to them; logprobs: of the rows that asked."""
    return tuple(
        RowResult((token,), (logprobs[row],) if row in logprobs else ())
        if math.isfinite(top)
        else RowResult(error=_NOTHING_LEFT if top == -math.inf else _NOT_FINITE)
        for row, (token, top) in enumerate(zip(token_ids, tops, strict=True))
    )


class Sampler:
    """Stateless; see SamplingState for what lasts from step to step."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops

    def sample(
        self,
        logits: torch.Tensor,
        slots: Sequence[int] | Ints,
        positions: Sequence[int] | Ints,
        state: SamplingState,
        tokens: torch.Tensor,
        masks: Masks | None = None,
    ) -> SampledTokens:
        """Draw a token for each of R rows, and count it where penalties are on.

        logits: [R, V] float32, may be overwritten. slots: [R], each at most once. positions: [R], absolute position of
        the token being drawn. tokens: [max_num_seqs, max_model_len + 1] integer, a row per slot, filled below the
        position. A row whose logits hold a NaN or +inf, or to which the masks leave nothing, yields token 0 and is
        reported by `SampledTokens.to_host`; other rows do not notice. No device sync on CUDA.
        """
        logits = logits.to(torch.float32).contiguous()
        rows = state.rows(slots, positions)
        asking = np.flatnonzero(rows.logprobs != NO_LOGPROBS)
        raw = _select(logits, asking) if len(asking) else None
        if raw is logits and (masks is not None or _edits(rows, state)):
            raw = logits.clone()
        if masks is not None:
            self._ops.mask_logits(logits, masks)
        _edit(logits, rows, state, tokens)
        peaks = self._ops.find_peaks(logits)
        drawn = self._choose(logits, peaks, rows, state)
        counted = _members(rows.slots, state.penalties)
        if len(counted):
            state.penalties.count(rows.slots[counted], counted, drawn)
        taken = () if raw is None else self._take(raw, drawn, asking, rows, state)
        copies = HostCopies((drawn, peaks.top, *(part for group in taken for part in group.logprobs.parts())))
        return SampledTokens(drawn, taken, copies)

    def _choose(self, logits: torch.Tensor, peaks: Peaks, rows: Rows, state: SamplingState) -> torch.Tensor:
        """[R] int64. Greedy rows and drawn rows of one batch do not touch one another."""
        drawing = np.flatnonzero(~rows.greedy)
        if not len(drawing):
            return peaks.token_ids
        drawn = self._ops.draw(logits, peaks, state.draws(rows, drawing))
        if len(drawing) == len(rows.slots):
            return drawn
        return peaks.token_ids.index_copy(0, send(drawing, drawn.device), drawn)

    def _take(
        self, raw: torch.Tensor, drawn: torch.Tensor, asking: Ints, rows: Rows, state: SamplingState
    ) -> tuple[_Taken, ...]:
        """raw: [len(asking), V], the asking rows' logits. Rows that ask for the whole vocabulary, or for tokens of
        their choice, are taken apart."""
        result = []
        ks, vocab_size = rows.logprobs[asking], raw.shape[1]
        choosing = _members(rows.slots[asking], state.candidates)
        if len(choosing):
            ks[choosing] = NO_LOGPROBS
            own = _select(drawn, asking[choosing])
            ids = [state.candidates[slot] for slot in rows.slots[asking[choosing]].tolist()]
            logits = _select(raw, choosing)
            taken = _of_candidates(logits, self._ops.take_logprobs(logits, own, 0), ids)
            result.append(_Taken(tuple(asking[choosing].tolist()), tuple(map(len, ids)), taken))
        for group in (np.flatnonzero(ks >= 0), np.flatnonzero(ks == -1)):
            if len(group):
                most = int(ks[group].max())
                k = vocab_size if most == -1 else min(most, vocab_size)
                taken = self._ops.take_logprobs(_select(raw, group), _select(drawn, asking[group]), k)
                result.append(_Taken(tuple(asking[group].tolist()), tuple(ks[group].tolist()), taken))
        return tuple(result)


def _of_candidates(logits: torch.Tensor, taken: Logprobs, ids: list[torch.Tensor]) -> Logprobs:
    """`taken` (of tokens [N] under logits [N, V]) with the candidates ids[i] of row i, in descending order."""
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1)
    values = logits.gather(1, padded.clamp(min=0)) - logits.gather(1, taken.token_ids[:, None]) + taken.own[:, None]
    values = values.nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)
    order = torch.argsort(values.masked_fill(padded < 0, -torch.inf), dim=1, descending=True, stable=True)
    return replace(taken, ids=padded.gather(1, order), values=values.gather(1, order))


def _edits(rows: Rows, state: SamplingState) -> bool:
    """Whether any stage may change these rows' logits."""
    return any(
        len(_members(rows.slots, kept))
        for kept in (state.allowed, state.bad_words, state.stops, state.bias, state.penalties)
    )


def _edit(logits: torch.Tensor, rows: Rows, state: SamplingState, tokens: torch.Tensor) -> None:
    """Masks, bias and penalties, in place on logits [R, V]."""
    allowed = _members(rows.slots, state.allowed)
    if len(allowed):
        row, ids = _pairs(allowed, [state.allowed[slot] for slot in rows.slots[allowed].tolist()])
        kept = logits[row, ids]
        logits[send(allowed, logits.device)] = -torch.inf
        logits[row, ids] = kept
    worded = _members(rows.slots, state.bad_words)
    if len(worded):
        _mask_bad_words(logits, worded, rows, state, tokens)
    stopless = _members(rows.slots, state.stops)
    if len(stopless):
        stopless = stopless[state.below_min_tokens(rows)[stopless]]
    if len(stopless):
        logits[_pairs(stopless, [state.stops[slot] for slot in rows.slots[stopless].tolist()])] = -torch.inf
    biased = _members(rows.slots, state.bias)
    if len(biased):
        biases = [state.bias[slot] for slot in rows.slots[biased].tolist()]
        logits[_pairs(biased, [ids for ids, _ in biases])] += torch.cat([values for _, values in biases])
    penalised = _members(rows.slots, state.penalties)
    if len(penalised):
        state.penalties.apply(logits, penalised, rows.slots[penalised])


def _mask_bad_words(logits: torch.Tensor, worded: Ints, rows: Rows, state: SamplingState, tokens: torch.Tensor) -> None:
    """Mask the last token of every bad word whose other tokens are the newest generated ones (prompt tokens do not
    match).
    """
    for row in worded.tolist():  # rows with bad words only: each costs O(its bad words)
        words = state.bad_words[int(rows.slots[row])]
        possible = send(words.lengths <= rows.num_output[row], logits.device)
        at = (int(rows.positions[row]) - words.back).clamp_(min=0)
        newest = tokens[int(rows.slots[row])][at.to(tokens.device)].to(logits.device)
        matches = possible & ((newest == words.want) | (words.want < 0)).all(dim=-1)
        # Added, not assigned: one token may end several words, of which some match and some do not.
        mask = torch.where(matches, -torch.inf, 0.0)
        logits[row].index_add_(0, words.last, mask)


def _members(slots: Ints, kept: object) -> Ints:
    """[N] int64: the rows whose slot is in `kept`. No row is looked at when it is empty."""
    if not kept:
        return np.zeros(0, np.int64)
    return np.flatnonzero([slot in kept for slot in slots.tolist()])  # type: ignore[operator]


def _pairs(rows: Ints, ids: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Index pairs (row, token id) for lists of ids per row."""
    return send(np.repeat(rows, [len(x) for x in ids]), ids[0].device), torch.cat(ids)


def _select(logits: torch.Tensor, rows: Ints) -> torch.Tensor:
    """logits[rows], or logits itself where all rows are meant."""
    if len(rows) == len(logits):
        return logits
    return logits[send(rows, logits.device)]


@dataclass(frozen=True, slots=True)
class _Taken:
    """Log probabilities of some rows of the batch. ks: as each row asked."""

    rows: tuple[int, ...]
    ks: tuple[int, ...]
    logprobs: Logprobs

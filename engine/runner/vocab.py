"""Logits of a vocabulary that is cut over ranks: each sampled row gets as much of the other ranks' as its draw needs.

What `gather` gives are whole rows [R, V] for the sampler, which does not know of ranks. But where the draw depends on a
few tokens alone, only these are sent, and the row holds -inf elsewhere:

- a greedy row: one maximum per rank;
- a row with top_k: k + 1 candidates per rank, or the whole row in the rare case that more tokens than that tie at the
  edge of the k, which all are kept;
- a row whose logits are changed before the draw (masks, bias, penalties), that asks for log probabilities, or that is
  drawn from more of the vocabulary: all of it.

Every rank makes the same draw from the same bits. Knows ranks, logits and which kind of draw a row makes; does not
know how a draw is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from octavo.engine.parallel.mesh import Group
from octavo.engine.runner.sampling_state import NO_LOGPROBS, Ints, Rows, SamplingState
from octavo.kernels.ops import Ops
from octavo.kernels.sampling import BLOCK
from octavo.kernels.send import send

NO_ROWS = np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True)
class _Kinds:
    """A step's rows by what they need, as places in the batch. top_k: of the rows `candidates`."""

    greedy: Ints
    candidates: Ints
    whole: Ints
    top_k: Ints

    @property
    def most(self) -> int:
        """Candidates per rank of a row."""
        return int(self.top_k.max()) + 1 if len(self.top_k) else 0


class VocabGather:
    """One per rank. All tp ranks of the last stage call `gather` with the same rows. Not for two threads.

    shares: the token ids of every rank. may_wait: for the device, to learn whether candidates tie; else rows with top_k
    are sent whole. bytes_received: from other ranks, since the start.
    """

    def __init__(self, ops: Ops, group: Group, shares: tuple[range, ...], may_wait: bool = True) -> None:
        self._ops, self._group, self._shares, self._may_wait = ops, group, shares, may_wait
        self._widest, self._narrowest = max(map(len, shares)), min(map(len, shares))
        self._starts = torch.tensor([share.start for share in shares])
        self._rows = torch.empty(0, shares[-1].stop)  # -inf but for what the last step has left in it
        self._left: list[tuple[torch.Tensor, ...]] = []
        self.bytes_received = 0

    def gather(
        self,
        local: torch.Tensor,
        slots: Sequence[int] | Ints,
        positions: Sequence[int] | Ints,
        state: SamplingState,
        masked: Ints = NO_ROWS,
    ) -> torch.Tensor:
        """local: [R, V of this rank] float32 → [R, V] float32, on which the sampler draws what it would from all of the
        logits. slots, positions: as `Sampler.sample` has them. masked: rows that masks will be put on. The result is
        overwritten by the next call.
        """
        if self._group.size == 1:
            return local
        rows = state.rows(slots, positions)
        kinds = self._kinds(rows, state, masked)
        everyone = self._exchange(self._pack(local, kinds))
        out = self._cleared(len(local), local.device)
        at = 0
        at = self._put_whole(out, everyone, kinds.whole, at)
        at = self._put_greedy(out, everyone, kinds.greedy, at)
        crowded = self._put_candidates(out, everyone, kinds, at)
        if len(crowded):
            again = self._exchange(self._padded(local, crowded))
            self._put_whole(out, again, crowded, 0)
        return out

    def _kinds(self, rows: Rows, state: SamplingState, masked: Ints) -> _Kinds:
        top_k = state.top_k(rows)
        few = rows.greedy | (self._may_wait & (2 * (top_k + 1) < self._narrowest))
        narrow = few & ~state.edits(rows) & (rows.logprobs == NO_LOGPROBS)
        narrow[masked] = False
        candidates = np.flatnonzero(narrow & ~rows.greedy)
        return _Kinds(np.flatnonzero(narrow & rows.greedy), candidates, np.flatnonzero(~narrow), top_k[candidates])

    def _pack(self, local: torch.Tensor, kinds: _Kinds) -> torch.Tensor:
        """What the others get from this rank: [n] int32, the same n on all. Floats go as their bits."""
        parts = []
        if len(kinds.whole):
            parts.append(self._padded(local, kinds.whole))
        if len(kinds.greedy):
            peaks = self._ops.find_peaks(_pick(local, kinds.greedy))
            parts += [_bits(peaks.top), peaks.token_ids.to(torch.int32)]
        if len(kinds.candidates):
            values, ids = self._largest(_pick(local, kinds.candidates), kinds.most)
            parts += [_bits(values), ids.to(torch.int32).flatten()]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _padded(self, local: torch.Tensor, rows: Ints) -> torch.Tensor:
        """Rows as wide as the widest share's. [n] int32."""
        mine = _pick(local, rows)
        if mine.shape[1] < self._widest:
            mine = torch.nn.functional.pad(mine, (0, self._widest - mine.shape[1]))
        return _bits(mine)

    def _largest(self, local: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """local: [N, v] → the k largest, descending, and where they are: [N, k] each. NaN is larger than all."""
        blocks = local.shape[1] // BLOCK
        if local.shape[1] % BLOCK or 4 * k > blocks:
            values, ids = local.topk(k, dim=-1)
            return values, ids
        # The k blocks with the largest maxima hold k tokens that no other token exceeds.
        chosen = self._ops.find_peaks(local).maxima.topk(k, dim=-1).indices
        rows = torch.arange(len(local), device=local.device)[:, None]
        values, place = local.view(len(local), blocks, BLOCK)[rows, chosen].flatten(1).topk(k, dim=-1)
        return values, chosen.gather(1, place // BLOCK) * BLOCK + place % BLOCK

    def _exchange(self, mine: torch.Tensor) -> torch.Tensor:
        """[n] → [size, n]."""
        self.bytes_received += mine.nbytes * (self._group.size - 1)
        return self._group.all_gather(mine)

    def _cleared(self, rows: int, device: torch.device) -> torch.Tensor:
        """[rows, V] of -inf. Only what the last step wrote is wiped: the whole may be megabytes."""
        if len(self._rows) < rows or self._rows.device != device:
            self._rows = torch.full((rows, self._rows.shape[1]), -torch.inf, device=device)
            self._starts = self._starts.to(device)
        else:
            for index in self._left:
                self._rows[index] = -torch.inf
        self._left = []
        return self._rows[:rows]

    def _put_whole(self, out: torch.Tensor, everyone: torch.Tensor, rows: Ints, at: int) -> int:
        """Put rows into `out` that begin at `at` of every rank's message; returns where they end."""
        if not len(rows):
            return at
        end = at + len(rows) * self._widest
        index = send(rows, out.device)
        for share, theirs in zip(self._shares, _floats(everyone[:, at:end]), strict=True):
            out[index, share.start : share.stop] = theirs.view(len(rows), self._widest)[:, : len(share)]
        self._left.append((index,))
        return end

    def _put_greedy(self, out: torch.Tensor, everyone: torch.Tensor, rows: Ints, at: int) -> int:
        n = len(rows)
        if not n:
            return at
        tops, ids = _floats(everyone[:, at : at + n]), everyone[:, at + n : at + 2 * n]
        self._put(out, send(rows, out.device), tops, ids)
        return at + 2 * n

    def _put_candidates(self, out: torch.Tensor, everyone: torch.Tensor, kinds: _Kinds, at: int) -> Ints:
        """Returns the rows that need more than was sent."""
        n, k = len(kinds.candidates), kinds.most
        if not n:
            return kinds.candidates
        shape = (len(self._shares), n, k)
        values = _floats(everyone[:, at : at + n * k]).reshape(shape)
        ids = everyone[:, at + n * k : at + 2 * n * k].reshape(shape)
        rows = send(kinds.candidates, out.device)
        self._put(out, rows[:, None].expand(n, k), values, ids)
        # A rank may have more tokens that are no larger than the least it sent. They are drawn from only if they are no
        # smaller than the row's k-th largest: then they equal both.
        merged = values.permute(1, 0, 2).flatten(1).sort(dim=1, descending=True).values
        kth = merged.gather(1, send(kinds.top_k - 1, out.device)[:, None])[:, 0]
        crowded = (values[:, :, -1] >= kth).any(dim=0)
        return kinds.candidates[crowded.cpu().numpy()]

    def _put(self, out: torch.Tensor, rows: torch.Tensor, values: torch.Tensor, ids: torch.Tensor) -> None:
        """rows: [...], values, ids: [size, ...], ids counted from each rank's first."""
        tokens = ids.long() + self._starts.view(-1, *[1] * rows.dim())
        index = (rows.expand_as(tokens), tokens)
        out[index] = values
        self._left.append(index)


def _pick(local: torch.Tensor, rows: Ints) -> torch.Tensor:
    return local if len(rows) == len(local) else local[send(rows, local.device)]


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.int32).flatten()


def _floats(bits: torch.Tensor) -> torch.Tensor:
    return bits.contiguous().view(torch.float32)

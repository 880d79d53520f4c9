"""Penalties and what they are counted by. Shapes and contracts: `octavo.kernels.ops`.

One launch each for all rows. Only the tokens of a row's list are read and written, each by one thread, since a list
holds a token once.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from octavo.kernels.sampling import Ints, Penalised, Tallies
from octavo.kernels.send import send
from octavo.kernels.triton.peaks import check_logits

TILE = 256  # tokens of a list that a program penalises
WARPS = 4


@triton.jit(do_not_specialize=["count", "width"])
def _apply_penalties(
    logits,  # [R, vocab]
    counts,  # [P, vocab] int32
    seen,  # [P, width] int64
    num_seen,  # [P] int64
    numbers,  # [5, count] float64, as `Penalised.numbers` says
    count,
    vocab,
    width,
    TILE: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64)
    place = tl.load(numbers + count + at).to(tl.int64)
    first = tl.program_id(1) * TILE
    if place >= 0:
        length = tl.load(num_seen + place)
        if first < length:
            entry = first + tl.arange(0, TILE)
            mine = entry < length
            token = tl.load(seen + place * width + entry, mask=mine, other=0)
            times = tl.load(counts + place * vocab + token, mask=mine, other=0)
            repetition = tl.load(numbers + 2 * count + at).to(tl.float32)
            frequency = tl.load(numbers + 3 * count + at).to(tl.float32)
            presence = tl.load(numbers + 4 * count + at).to(tl.float32)
            logit = logits + tl.load(numbers + at).to(tl.int64) * vocab + token
            x = tl.load(logit, mask=mine, other=0.0)
            x = tl.where(x > 0.0, tl.div_rn(x, tl.full(x.shape, 1.0, tl.float32) * repetition), x * repetition)
            x -= frequency * times.to(tl.float32)
            x -= tl.where(times > 0, presence, 0.0)
            tl.store(logit, x, mask=mine)


@triton.jit(do_not_specialize=["count", "width"])
def _count_tokens(
    counts,  # [P, vocab] int32
    known,  # [P, vocab] uint8
    seen,  # [P, width] int64
    num_seen,  # [P] int64
    numbers,  # [2 or more, count] float64, as `Penalised.numbers` says
    token_ids,  # [R] int64
    count,
    vocab,
    width,
):
    at = tl.program_id(0).to(tl.int64)
    place = tl.load(numbers + count + at).to(tl.int64)
    if place >= 0:
        token = tl.load(token_ids + tl.load(numbers + at).to(tl.int64))
        cell = place * vocab + token
        tl.store(counts + cell, tl.load(counts + cell) + 1)
        if tl.load(known + cell) == 0:
            end = tl.load(num_seen + place)
            tl.store(known + cell, 1)
            tl.store(seen + place * width + end, token)
            tl.store(num_seen + place, end + 1)


def apply_penalties(logits: torch.Tensor, tallies: Tallies, penalised: Penalised) -> None:
    if penalised.longest:
        penalise_rows(logits, tallies, send(penalised.numbers(), logits.device), penalised.longest)


def penalise_rows(logits: torch.Tensor, tallies: Tallies, numbers: torch.Tensor, longest: int) -> None:
    """numbers: [5, N] float64 on the device, as `Penalised.numbers` says, but that a place of -1 means no penalty: for
    graphs, which read them anew in every replay. longest: of any list until then."""
    check_logits(logits)
    count, width = numbers.shape[1], tallies.seen.shape[1]
    if not count:
        return
    _apply_penalties[(count, triton.cdiv(longest, TILE))](
        logits,
        tallies.counts,
        tallies.seen,
        tallies.num_seen,
        numbers,
        count,
        logits.shape[1],
        width,
        TILE=TILE,
        num_warps=WARPS,
        enable_fp_fusion=False,  # each penalty is rounded by itself, as in `ref`
    )


def count_tokens(tallies: Tallies, places: Ints, rows: Ints, token_ids: torch.Tensor) -> None:
    count_rows(tallies, send(np.stack([rows, places]).astype(np.float64), token_ids.device), token_ids)


def count_rows(tallies: Tallies, numbers: torch.Tensor, token_ids: torch.Tensor) -> None:
    """numbers: as for `penalise_rows`, of which the first two are read."""
    count, (_, vocab), width = numbers.shape[1], tallies.counts.shape, tallies.seen.shape[1]
    if count:
        known = tallies.known.view(torch.uint8)
        _count_tokens[(count,)](
            tallies.counts, known, tallies.seen, tallies.num_seen, numbers, token_ids, count, vocab, width, num_warps=1
        )

"""Draws without a sort. Shapes and contract: `octavo.kernels.ops.Draw`; words: `octavo.kernels.ref.sampling`.

A draw is four launches, of which rows without filters need the first and the last:

    sum_blocks     the weights of all tokens, by block
    _find_limits   one program per row: the largest gap that min_p, top_k and top_p keep, exactly
    sum_blocks     the weights within the limits
    _find_tokens   one program per row: the block, then the token, that the uniform falls on

A limit needs few readings of few logits: k blocks whose maxima are the largest hold the k most likely tokens, and what
top_p drops lies beyond a gap that the blocks' sums bound. The logits within that bound are collected, and the gap at
which their ascending count or weight reaches what is asked for is found digit by digit in the bits of the gaps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo.kernels.sampling import BLOCK, Draws, Peaks
from octavo.kernels.send import send
from octavo.kernels.triton.block_sums import gaps_of, sum_blocks, weights_of
from octavo.kernels.triton.peaks import check_logits

PIECE = 512  # logits that a search looks at together
BLOCKS = 16  # that are collected together
WARPS = 8
# Nearer to 1 than this, what top_p drops is too little to be bounded by sums of rounded weights.
BOUNDED_TOP_P = 0.999

_INFINITE = tl.constexpr(0x7F800000)  # the bits of infinity


@triton.jit
def _mass(logits, count, top, scale, limit, PIECE: tl.constexpr):
    """Float64: what logits [count] weigh that are within the limit."""
    mass = tl.full([PIECE], 0.0, tl.float64)
    for first in range(0, count, PIECE):
        place = first + tl.arange(0, PIECE)
        gaps = gaps_of(tl.load(logits + place, mask=place < count, other=-float("inf")), top)
        mass += weights_of(gaps, scale, limit).to(tl.float64)
    return tl.sum(mass)


@triton.jit
def _crossing(logits, count, top, scale, wanted, WEIGH: tl.constexpr, PIECE: tl.constexpr):
    """The gap at which, in ascending order, logits [count] reach `wanted`; infinity if they never do.

    They count 1 each, or their weights. Four bits of the answer at a time: the greatest digit below which what is
    wanted is not reached. Sums are of the same terms at the same places for every digit, so they ascend with it.
    """
    digit = tl.arange(0, 16)
    found = tl.full([], 0, tl.int64)
    for i in range(8):
        shift = 28 - 4 * i
        edges = found + (digit.to(tl.int64) << shift)
        below = tl.full([16], 0.0, tl.float64)
        for first in range(0, count, PIECE):
            place = first + tl.arange(0, PIECE)
            gaps = gaps_of(tl.load(logits + place, mask=place < count, other=float("nan")), top)
            terms = tl.exp(gaps * -scale) if WEIGH else tl.full([PIECE], 1.0, tl.float32)
            counted = gaps.to(tl.int32, bitcast=True).to(tl.int64)[None, :] < edges[:, None]
            below += tl.sum(tl.where(counted & (place < count)[None, :], terms[None, :], 0.0).to(tl.float64), axis=1)
        reached = tl.sum((below < wanted).to(tl.int64)) - 1
        found += tl.maximum(reached, 0) << shift
    bits = tl.minimum(found, _INFINITE)
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _spared_beyond(sums, blocks, spared, ALL: tl.constexpr, BLOCK: tl.constexpr):
    """A gap, in units of the temperature, beyond which all tokens together weigh at most `spared`; or infinity."""
    block = tl.arange(0, ALL)
    held = tl.load(sums + block, mask=block < blocks, other=0.0)
    low, high = tl.full([], 0.0, tl.float32), tl.full([], 128.0, tl.float32)
    for _ in range(10):
        middle = (low + high) * 0.5
        weigh = tl.sum(tl.minimum(held, BLOCK * tl.exp(-middle)))
        low = tl.where(weigh <= spared, low, middle)
        high = tl.where(weigh <= spared, middle, high)
    return tl.where(high < 128.0, high, float("inf"))


@triton.jit
def _collect(
    found,
    places,
    logits,
    maxima,
    top,
    bound,
    vocab,
    blocks,
    ALL: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """How many logits have gaps up to the bound, a finite one. They come to found [vocab], in token order.

    places: [blocks] int32, overwritten: the blocks that hold such logits, so that no others are read.
    """
    block = tl.arange(0, ALL)
    peak = tl.load(maxima + block, mask=block < blocks, other=-float("inf"))
    near = (gaps_of(peak, top) <= bound).to(tl.int32)
    tl.store(places + tl.cumsum(near) - near, block, mask=near > 0)
    tl.debug_barrier()  # what other threads have stored is read next
    held = tl.sum(near)
    count = tl.full([], 0, tl.int32)
    for first in range(0, held, BLOCKS):
        which = first + tl.arange(0, BLOCKS)
        chosen = tl.load(places + which, mask=which < held, other=blocks)
        token = chosen[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        x = tl.reshape(tl.load(logits + token, mask=token < vocab, other=-float("inf")), [BLOCKS * BLOCK])
        kept = (gaps_of(x, top) <= bound).to(tl.int32)
        tl.store(found + count + tl.cumsum(kept) - kept, x, mask=kept > 0)
        count += tl.sum(kept)
    tl.debug_barrier()
    return count


@triton.jit(do_not_specialize=["count"])
def _find_limits(
    limits,  # [N]
    found,  # [N, vocab]: scratch
    places,  # [N, blocks] int32: scratch
    sums,  # [N, blocks] float64, of all tokens
    logits,  # [R, vocab]
    maxima,  # [R, blocks]
    tops,  # [R]
    numbers,  # [6, N] float64, as `Draws.numbers` says
    count,
    vocab,
    blocks,
    ALL: tl.constexpr,  # blocks, to the next power of two
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    PIECE: tl.constexpr,
    BOUNDED_TOP_P: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64)
    row = tl.load(numbers + at).to(tl.int64)
    scale = tl.load(numbers + count + at).to(tl.float32)
    limit = tl.load(numbers + 2 * count + at).to(tl.float32)
    top_k = tl.load(numbers + 3 * count + at)
    top_p = tl.load(numbers + 4 * count + at)
    top = tl.load(tops + row)
    maxima += row * blocks
    logits += row * vocab
    sums += at * blocks
    found += at * vocab
    places += at * blocks

    whole = tl.sum(tl.load(sums + tl.arange(0, ALL), mask=tl.arange(0, ALL) < blocks, other=0.0))
    narrowed = (top_k < vocab) | (limit < float("inf"))  # then top_p is a part of what these two leave
    if narrowed | (top_p < 1.0):
        bound = limit
        if top_k < vocab:
            bound = tl.minimum(bound, _crossing(maxima, blocks, top, scale, top_k, False, PIECE))
        if (not narrowed) & (top_p < BOUNDED_TOP_P):
            bound = _spared_beyond(sums, blocks, 0.99 * (1.0 - top_p) * whole, ALL, BLOCK) / scale
        bound = tl.minimum(bound, 3.4028234663852886e38)  # infinite gaps weigh nothing
        held = _collect(found, places, logits, maxima, top, bound, vocab, blocks, ALL, BLOCK, BLOCKS)
        if top_k < vocab:
            limit = tl.minimum(limit, _crossing(found, held, top, scale, top_k, False, PIECE))
        if top_p < 1.0:
            mass = whole
            if narrowed:
                mass = _mass(found, held, top, scale, limit, PIECE)
            limit = tl.minimum(limit, _crossing(found, held, top, scale, top_p * mass, True, PIECE))
    tl.store(limits + at, limit)


@triton.jit(do_not_specialize=["count"])
def _find_tokens(
    token_ids,  # [N] int64
    sums,  # [N, blocks] float64, within the limits
    limits,  # [N]
    logits,  # [R, vocab]
    tops,  # [R]
    numbers,  # [6, N] float64, as `Draws.numbers` says
    count,
    vocab,
    blocks,
    ALL: tl.constexpr,  # blocks, to the next power of two
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64)
    row = tl.load(numbers + at).to(tl.int64)
    scale = tl.load(numbers + count + at).to(tl.float32)
    uniform = tl.load(numbers + 5 * count + at)
    top = tl.load(tops + row)
    block = tl.arange(0, ALL)
    held = tl.load(sums + at * blocks + block, mask=block < blocks, other=0.0)
    chosen, rest = _find(held, uniform * tl.sum(held), ALL)
    place = tl.arange(0, BLOCK)
    token = chosen * BLOCK + place
    x = tl.load(logits + row * vocab + token, mask=token < vocab, other=-float("inf"))
    weights = weights_of(gaps_of(x, top), scale, tl.load(limits + at)).to(tl.float64)
    within, _ = _find(weights, rest, BLOCK)
    drawn = tl.where(tl.abs(top) < float("inf"), chosen * BLOCK + within, 0)
    tl.store(token_ids + at, drawn.to(tl.int64))


@triton.jit
def _find(masses, target, COUNT: tl.constexpr):
    """The place whose part of the CDF of masses [COUNT] holds the target, and how far into it.

    Never a place of no mass, not even where rounding leaves the target beyond the last edge.
    """
    place = tl.arange(0, COUNT)
    edges = tl.cumsum(masses)
    holds = masses > 0.0
    first = tl.min(tl.where(holds & (edges > target), place, COUNT))
    last = tl.max(tl.where(holds, place, 0))
    found = tl.where(first < COUNT, first, last)
    return found, target - tl.max(tl.where(place < found, edges, 0.0))


def draw(logits: torch.Tensor, peaks: Peaks, draws: Draws) -> torch.Tensor:
    check_logits(logits)
    return draw_rows(logits, peaks, send(draws.numbers(), logits.device), draws.filtered(logits.shape[1]))


def draw_rows(logits: torch.Tensor, peaks: Peaks, numbers: torch.Tensor, filtered: bool) -> torch.Tensor:
    """Takes scratch of N rows of V where `filtered` is True."""
    count, vocab, blocks, device = numbers.shape[1], logits.shape[1], peaks.maxima.shape[1], logits.device
    token_ids = torch.empty(count, dtype=torch.int64, device=device)
    if not count:
        return token_ids
    limits = torch.full((count,), torch.inf, device=device)
    sums = torch.empty(count, blocks, dtype=torch.float64, device=device)
    row_sums = (sums, logits, peaks.maxima, peaks.top, numbers[0], numbers[1], limits)
    shapes = {"ALL": triton.next_power_of_2(blocks), "BLOCK": BLOCK, "num_warps": WARPS}
    sum_blocks(*row_sums)
    if filtered:
        found = torch.empty(count, vocab, device=device)
        places = torch.empty(count, blocks, dtype=torch.int32, device=device)
        _find_limits[(count,)](
            limits,
            found,
            places,
            sums,
            logits,
            peaks.maxima,
            peaks.top,
            numbers,
            count,
            vocab,
            blocks,
            BLOCKS=BLOCKS,
            PIECE=PIECE,
            BOUNDED_TOP_P=BOUNDED_TOP_P,
            **shapes,
        )
        sum_blocks(*row_sums, again=True)
    _find_tokens[(count,)](token_ids, sums, limits, logits, peaks.top, numbers, count, vocab, blocks, **shapes)
    return token_ids

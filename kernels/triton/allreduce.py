"""Sums over the GPUs of one node, by kernels that read one another's memory; alone, or with the norm that comes next.

Every rank has one buffer that all ranks can address (symmetric memory). Two ways to sum, both in rank order, so that
all ranks get the same bits, and a row the same whatever else is in x:

- one-shot: each rank writes its x where others see it, waits for theirs, and adds all of it up. One exchange.
- two-shot: each rank adds up its share, and all collect the shares' sums. Two exchanges; less is read.

A program has the same number on every rank, and deals with the same tiles. It waits only for the programs of its own
number on the other ranks, so programs may run one after the other, and nothing waits for a launch to be whole.

A program's signals are the number of the call, counted in device memory by the program itself: a CUDA graph replays
them like any other launch. Calls alternate between two halves of the buffer. A rank overwrites a half when it has the
signals of the call before from all ranks, and each sent that after it had read this half for the last time.

Knows tensors and addresses. Does not know processes, nor how the memory came to be shared.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from octavo.kernels.rounded import Rounded, Rounding
from octavo.kernels.triton.norm import PLAIN, inverse_rms, results_of, store_norms, tile_of
from octavo.kernels.triton.quantize_rows import quantize_rows, size_in_tile

# Origin of these numbers: estimates, from what others report for H100 nodes; not measured.
PROGRAMS = 64  # at most, of a launch
MOST_RANKS = 8
TILE = 2048  # elements that a program moves at once

SIGNALS = 2  # of a call: "written", "summed"
HEAD = 4096  # bytes of signals at the buffer's front: [PROGRAMS, SIGNALS, MOST_RANKS] int32
assert 4 * PROGRAMS * SIGNALS * MOST_RANKS <= HEAD


@dataclass(frozen=True, slots=True)
class Peers:
    """The shared buffers of the ranks, as this rank sees them.

    buffers: [size] int64 on the device, where each rank's buffer begins in this process' addresses: `buffer_bytes`
    long, its head zero before the first call. calls: [PROGRAMS] int32, zero before the first call, this rank's own.
    part_bytes: of the buffer, that a program has for one call; a multiple of 16.

    All ranks make the same calls, in the same order, each on one stream at a time.
    """

    rank: int
    size: int
    buffers: torch.Tensor
    calls: torch.Tensor
    part_bytes: int

    @property
    def most_bytes(self) -> int:
        """Of the largest tensor that fits."""
        return PROGRAMS * self.part_bytes


def buffer_bytes(part_bytes: int) -> int:
    return HEAD + 2 * PROGRAMS * part_bytes


@triton.jit
def _announce(buffers, program, signal: tl.constexpr, call, rank, RANKS: tl.constexpr, MOST: tl.constexpr):
    """Tell all ranks, this one too, that what was written until now may be read."""
    peer = tl.arange(0, MOST)
    there = tl.load(buffers + peer, mask=peer < RANKS, other=0).to(tl.pointer_type(tl.int32), bitcast=True)
    # The release is of the few threads that signal: what the others wrote comes before it by the barrier.
    tl.debug_barrier()
    slot = (program * 2 + signal) * MOST + rank
    tl.atomic_xchg(there + slot, tl.zeros([MOST], tl.int32) + call, mask=peer < RANKS, sem="release", scope="sys")


@triton.jit
def _await(buffers, program, signal: tl.constexpr, call, rank, RANKS: tl.constexpr, MOST: tl.constexpr):
    """Until all ranks have announced as much in this call. A rank may be in the next one already: never equality; and
    the difference, since the counts wrap around."""
    peer = tl.arange(0, MOST)
    here = tl.load(buffers + rank).to(tl.pointer_type(tl.int32), bitcast=True)
    slots = here + (program * 2 + signal) * MOST + peer
    found = tl.load(slots, mask=peer < RANKS, other=0, volatile=True)
    while tl.min(tl.where(peer < RANKS, found - call, 0), axis=0) < 0:
        found = tl.load(slots, mask=peer < RANKS, other=0, volatile=True)
    # The loads above order nothing; this does, for the threads it is done by, and the barrier for the others.
    tl.atomic_add(slots, tl.zeros([MOST], tl.int32), mask=peer < RANKS, sem="acquire", scope="sys")
    tl.debug_barrier()


@triton.jit
def _part(buffers, peer, call, program, like, HEAD: tl.constexpr, PROGRAMS: tl.constexpr, PART: tl.constexpr):
    """Where a rank keeps what the program of this number has written in this call. PART: elements."""
    base = tl.load(buffers + peer).to(tl.pointer_type(tl.uint8), bitcast=True) + HEAD
    start = tl.multiple_of(base, 16).to(like.dtype, bitcast=True)
    return start + ((call & 1) * PROGRAMS + program) * PART


@triton.jit(do_not_specialize=["rank"])  # of count it is of use to know that whole vectors fit
def _one_shot(
    out,  # [count]
    x,  # [count]
    buffers,  # Peers.buffers
    calls,  # Peers.calls
    count,
    rank,
    RANKS: tl.constexpr,
    MOST: tl.constexpr,
    HEAD: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PART: tl.constexpr,
    TILE: tl.constexpr,
):
    program, step = tl.program_id(0), tl.num_programs(0)
    call = tl.load(calls + program) + 1
    mine = _part(buffers, rank, call, program, x, HEAD, PROGRAMS, PART)
    column = tl.arange(0, TILE)
    kept = 0  # where in the part the tile is
    for tile in range(program, tl.cdiv(count, TILE), step):
        at = tile * TILE + column
        tl.store(mine + kept + column, tl.load(x + at, mask=at < count, other=0.0))
        kept += TILE
    _announce(buffers, program, 0, call, rank, RANKS, MOST)
    _await(buffers, program, 0, call, rank, RANKS, MOST)
    kept = 0
    for tile in range(program, tl.cdiv(count, TILE), step):
        at = tile * TILE + column
        total = tl.zeros([TILE], tl.float32)
        for peer in tl.static_range(RANKS):
            theirs = _part(buffers, peer, call, program, x, HEAD, PROGRAMS, PART)
            total += tl.load(theirs + kept + column).to(tl.float32)
        tl.store(out + at, total.to(out.dtype.element_ty), mask=at < count)
        kept += TILE
    tl.store(calls + program, call)


@triton.jit(do_not_specialize=["rank"])  # of count it is of use to know that whole vectors fit
def _two_shot(
    out,  # [count]
    x,  # [count]
    buffers,
    calls,
    count,
    rank,
    RANKS: tl.constexpr,
    MOST: tl.constexpr,
    HEAD: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PART: tl.constexpr,
    TILE: tl.constexpr,
):
    """A program's tiles are dealt to the ranks in turn. A rank keeps the sums of its tiles where its own values of them
    were, which no other rank reads."""
    program, step = tl.program_id(0), tl.num_programs(0)
    call = tl.load(calls + program) + 1
    mine = _part(buffers, rank, call, program, x, HEAD, PROGRAMS, PART)
    column = tl.arange(0, TILE)
    tiles = tl.cdiv(tl.cdiv(count, TILE) - program, step)
    for i in range(0, tiles):
        at = (program + i * step) * TILE + column
        tl.store(mine + i * TILE + column, tl.load(x + at, mask=at < count, other=0.0))
    _announce(buffers, program, 0, call, rank, RANKS, MOST)
    _await(buffers, program, 0, call, rank, RANKS, MOST)
    for i in range(rank, tiles, RANKS):
        total = tl.zeros([TILE], tl.float32)
        for peer in tl.static_range(RANKS):
            theirs = _part(buffers, peer, call, program, x, HEAD, PROGRAMS, PART)
            total += tl.load(theirs + i * TILE + column).to(tl.float32)
        tl.debug_barrier()  # other threads may yet have to read what this one overwrites
        tl.store(mine + i * TILE + column, total.to(x.dtype.element_ty))
    _announce(buffers, program, 1, call, rank, RANKS, MOST)
    _await(buffers, program, 1, call, rank, RANKS, MOST)
    for i in range(0, tiles):
        at = (program + i * step) * TILE + column
        theirs = _part(buffers, i % RANKS, call, program, x, HEAD, PROGRAMS, PART)
        tl.store(out + at, tl.load(theirs + i * TILE + column), mask=at < count)
    tl.store(calls + program, call)


@triton.jit(do_not_specialize=["count", "rank"])
def _sum_add_rms_norm(
    out,  # [count, width], contiguous: x itself, unless rounded
    scales,
    x,  # [count, width], contiguous
    residual,  # [count, width]: becomes the sum
    weight,  # [width]
    buffers,
    calls,
    count,
    residual_stride,
    eps,
    rank,
    width: tl.constexpr,
    WIDTH: tl.constexpr,  # the next power of two
    RANKS: tl.constexpr,
    MOST: tl.constexpr,
    HEAD: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PART: tl.constexpr,
    ROW: tl.constexpr,  # elements from row to row in a part
    SIZE: tl.constexpr,
    LARGEST: tl.constexpr,
    INTEGERS: tl.constexpr,
):
    program, step = tl.program_id(0), tl.num_programs(0)
    call = tl.load(calls + program) + 1
    mine = _part(buffers, rank, call, program, x, HEAD, PROGRAMS, PART)
    one, column = tl.arange(0, 1), tl.arange(0, WIDTH)
    held, at = (column < width)[None, :], one[:, None] + column[None, :]  # [1, WIDTH]
    kept = 0
    for row in range(program, count, step):
        tl.store(mine + kept + at, tl.load(x + row * width + at, mask=held), mask=held)
        kept += ROW
    _announce(buffers, program, 0, call, rank, RANKS, MOST)
    weights = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    _await(buffers, program, 0, call, rank, RANKS, MOST)
    kept = 0
    for row in range(program, count, step):
        total = tl.zeros([1, WIDTH], tl.float32)
        for peer in tl.static_range(RANKS):
            theirs = _part(buffers, peer, call, program, x, HEAD, PROGRAMS, PART)
            total += tl.load(theirs + kept + at, mask=held, other=0.0).to(tl.float32)
        kept += ROW
        total = total.to(x.dtype.element_ty).to(tl.float32)  # as if it had been stored in between
        into = residual + row * residual_stride + at
        total += tl.load(into, mask=held, other=0.0).to(tl.float32)
        rounded = total.to(x.dtype.element_ty)  # the norm is of what the next layer will read
        tl.store(into, rounded, mask=held)
        value = rounded.to(tl.float32)
        scale = inverse_rms(value, eps, width)
        result = (value * scale[:, None] * weights[None, :]).to(x.dtype.element_ty)
        store_norms(out, scales, result, row + one, column, count, width, width, SIZE, LARGEST, INTEGERS)
    tl.store(calls + program, call)


def fits(x: torch.Tensor, peers: Peers) -> bool:
    """Whether `one_shot` and `two_shot` have room for x."""
    return triton.cdiv(triton.cdiv(x.numel(), TILE), PROGRAMS) * TILE * x.itemsize <= peers.part_bytes


def rows_fit(x: torch.Tensor, peers: Peers) -> bool:
    """Whether `sum_add_rms_norm` has room for x [T, M]."""
    return x.dim() == 2 and triton.cdiv(len(x), PROGRAMS) * _row_stride(x) * x.itemsize <= peers.part_bytes


def one_shot(x: torch.Tensor, peers: Peers) -> torch.Tensor:
    """The sum of all ranks' x (contiguous, one shape and dtype on all): in x's dtype, rounded once from float32, in
    rank order. x is left as it was."""
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    grid = min(PROGRAMS, triton.cdiv(x.numel(), TILE))
    _one_shot[(grid,)](out, x, peers.buffers, peers.calls, x.numel(), peers.rank, **_options(x, peers), TILE=TILE)
    return out


def two_shot(x: torch.Tensor, peers: Peers) -> torch.Tensor:
    """As `one_shot`, bit for bit."""
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    grid = min(PROGRAMS, triton.cdiv(x.numel(), TILE))
    _two_shot[(grid,)](out, x, peers.buffers, peers.calls, x.numel(), peers.rank, **_options(x, peers), TILE=TILE)
    return out


def sum_add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    peers: Peers,
    rounding: Rounding | None = None,
) -> tuple[torch.Tensor | Rounded, torch.Tensor]:
    """add_rms_norm (see `octavo.kernels.ops`) of what `one_shot` makes of x [T, M] contiguous: (norm, sum), the same
    bits on all ranks. The ranks' sum is rounded to x's dtype before the residual is added: the bits of the two ops.
    residual: [T, M], the same on all ranks, becomes the sum; x becomes the norm, if that is not rounded.
    """
    count, width = x.shape
    _, padded, _, warps = tile_of(width)
    size = 0 if rounding is None else size_in_tile(rounding, width, padded)
    if size is None:
        norm, total = sum_add_rms_norm(x, residual, weight, eps, peers)
        return quantize_rows(norm, rounding), total
    residual = residual if residual.stride(1) == 1 else residual.contiguous()
    out, target, scales, form = (x, x, None, PLAIN) if rounding is None else results_of(x, rounding, size)
    if x.numel() == 0:
        return out, residual
    _sum_add_rms_norm[(min(PROGRAMS, count),)](
        target,
        scales,
        x,
        residual,
        weight,
        peers.buffers,
        peers.calls,
        count,
        residual.stride(0),
        eps,
        peers.rank,
        width,
        padded,
        **_options(x, peers, warps),
        ROW=_row_stride(x),
        **form,
        enable_fp_fusion=False,
    )
    return out, residual


def _options(x: torch.Tensor, peers: Peers, warps: int = 8) -> dict[str, int]:
    return {
        "RANKS": peers.size,
        "MOST": MOST_RANKS,
        "HEAD": HEAD,
        "PROGRAMS": PROGRAMS,
        "PART": peers.part_bytes // x.itemsize,
        "num_warps": warps,
    }


def _row_stride(x: torch.Tensor) -> int:
    """Elements: rows begin at multiples of 16 bytes."""
    return triton.cdiv(x.shape[1] * x.itemsize, 16) * 16 // x.itemsize

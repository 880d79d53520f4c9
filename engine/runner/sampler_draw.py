"""From logits to one token per row: the greedy choice, and the inverse-CDF draw under temperature, min_p, top_k and
top_p.

Knows tensors and per-row numbers. Does not know slots, penalties or masks. A row's token depends on its own logits,
numbers and uniform alone, bit for bit, whatever else is in the batch and whichever of the ways below computes it.

Everything is done on a row's *gaps*, its largest logit minus each logit. All three filters are then one threshold:
keep the tokens whose gap is at most `limit`. Tokens that tie at the threshold are all kept, so that the kept set is a
property of the row and not of a sort. (vLLM keeps ties of top_k likewise; at the edge of top_p it leaves them to its
sort.)

The CDF runs in token order, not in order of probability: where two logits change places by a rounding error, edges move
by as much as the error and the same uniform finds the same token almost surely; sorted, the two would swap whole
intervals. It is summed in two levels, within blocks of BLOCK tokens in float32, over blocks in float64, so that a
row's total needs one reading of its logits and blocks without kept tokens can be left out without changing a bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

BLOCK = 64
# Blocks tried first for a filtered row: this many blocks hold at least this many of the most likely tokens.
NARROW_BLOCKS = 128
# Elements worked on at a time: on a CPU a piece should stay in its cache, on a GPU it only bounds memory.
_CPU_PIECE = 1 << 18
_GPU_PIECE = 1 << 26

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Blocks:
    """A step's logits in blocks. values: [R, NB, BLOCK] float32, padded with -inf. maxima: [R, NB]. top: [R]."""

    values: torch.Tensor
    maxima: torch.Tensor
    top: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor) -> Blocks:
        """logits: [R, V] float32, contiguous; not copied where BLOCK divides V."""
        vocab = logits.shape[1]
        if vocab % BLOCK:
            logits = torch.nn.functional.pad(logits, (0, -vocab % BLOCK), value=-torch.inf)
        values = logits.view(len(logits), logits.shape[1] // BLOCK, BLOCK)
        maxima = values.amax(dim=-1)
        return cls(values, maxima, maxima.amax(dim=-1))


@dataclass(frozen=True, slots=True)
class Draws:
    """How the N drawn rows of a step are drawn. Host arrays [N].

    rows: their places in the batch. top_k: at least the vocabulary size = all. uniforms: in (0, 1).
    """

    rows: Ints
    temperature: Floats
    top_k: Ints
    top_p: Floats
    min_p: Floats
    uniforms: Floats

    def pick(self, mask: Mask | Ints) -> Draws:
        return Draws(
            self.rows[mask],
            self.temperature[mask],
            self.top_k[mask],
            self.top_p[mask],
            self.min_p[mask],
            self.uniforms[mask],
        )


@dataclass(frozen=True, slots=True)
class _Numbers:
    """Draws as device tensors. scale: [N] float32 = 1/temperature; min_p as max_gap [N] float32; the others [N]."""

    rows: torch.Tensor
    scale: torch.Tensor
    max_gap: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    uniforms: torch.Tensor

    @classmethod
    def of(cls, draws: Draws, device: torch.device) -> _Numbers:
        with np.errstate(divide="ignore"):  # min_p 0 keeps every gap
            max_gap = -np.log(draws.min_p) * draws.temperature
        return cls(
            rows=torch.from_numpy(draws.rows).to(device),
            scale=torch.from_numpy((1.0 / draws.temperature).astype(np.float32)).to(device),
            max_gap=torch.from_numpy(max_gap.astype(np.float32)).to(device),
            top_k=torch.from_numpy(draws.top_k).to(device),
            top_p=torch.from_numpy(draws.top_p).to(device),
            uniforms=torch.from_numpy(draws.uniforms).to(device),
        )


def row_sums(blocks: Blocks) -> torch.Tensor:
    """[R] float64: the sum over each row of exp(logit - largest logit). NaN where the largest is not finite."""
    rows = torch.arange(len(blocks.top), device=blocks.top.device)
    return _block_mass(blocks, rows, torch.ones_like(blocks.top)).sum(dim=-1, dtype=torch.float64)


def greedy(blocks: Blocks) -> torch.Tensor:
    """[R] int64: the most likely token of every row, the lowest id among equals."""
    block = blocks.maxima.argmax(dim=-1)
    best = blocks.values[torch.arange(len(block), device=block.device), block]
    return block * BLOCK + best.argmax(dim=-1)


def draw(blocks: Blocks, draws: Draws, vocab_size: int, narrow_blocks: int = NARROW_BLOCKS) -> torch.Tensor:
    """[N] int64: the tokens drawn for draws.rows.

    A row whose largest logit is not finite gets some token below NB * BLOCK, without harm to others. No host sync,
    except on CPU. `narrow_blocks` changes the cost, never the result.
    """
    device = blocks.values.device
    tokens = torch.zeros(len(draws.rows), dtype=torch.int64, device=device)
    unbounded = (draws.top_k >= vocab_size) & (draws.min_p <= 0)  # the row's whole mass matters
    plain = unbounded & (draws.top_p >= 1)
    mass = torch.full((len(draws.rows),), torch.nan, dtype=torch.float64, device=device)
    if unbounded.any():
        numbers = _Numbers.of(draws.pick(unbounded), device)
        edges = _block_mass(blocks, numbers.rows, numbers.scale).cumsum(dim=-1, dtype=torch.float64)
        mass[_index(unbounded, device)] = edges[:, -1]
        if plain.any():
            of_plain = _index(plain[unbounded], device)
            tokens[_index(plain, device)] = _draw_plain(blocks, _Numbers.of(draws.pick(plain), device), edges[of_plain])
    left = np.flatnonzero(~plain)
    bounds = draws.top_k[left][draws.top_k[left] < vocab_size]
    largest_k = int(bounds.max(initial=1))
    if largest_k <= 4 * narrow_blocks and (largest_k > narrow_blocks or len(bounds) == len(left)):
        narrow_blocks = largest_k  # k blocks surely hold the k most likely tokens
    # A sync-free device cannot ask which rows the narrow way has settled, so there every row goes the whole way.
    if len(left) and device.type == "cpu" and narrow_blocks * 2 < blocks.maxima.shape[1]:
        numbers = _Numbers.of(draws.pick(left), device)
        found, settled = _draw_narrow(blocks, numbers, mass[_index(left, device)], narrow_blocks)
        tokens[_index(left, device)] = found
        left = left[~settled.numpy()]
    step = max(1, (_CPU_PIECE if device.type == "cpu" else _GPU_PIECE) // (blocks.maxima.shape[1] * BLOCK))
    for first in range(0, len(left), step):
        part = left[first : first + step]
        numbers = _Numbers.of(draws.pick(part), device)
        gaps = blocks.top[numbers.rows, None, None] - blocks.values[numbers.rows]
        limit, _ = _limits(gaps.flatten(1), numbers, mass[_index(part, device)])
        tokens[_index(part, device)] = _draw_below(gaps, limit, numbers)
    return tokens


def _index(which: Mask | Ints, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.flatnonzero(which) if which.dtype == np.bool_ else which).to(device)


def _weights(gaps: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """exp(-gap * scale) in place: the most likely token weighs 1. gaps: [N, ...] float32, scale: [N].

    On a CPU by numpy: torch.exp takes up to twenty times as long on subnormal results, which most of a vocabulary is
    at low temperature, and torch.exp2 rounds the ends of its vectors differently, so that a row would depend on its
    neighbours.
    """
    gaps.mul_(-scale.view(-1, *[1] * (gaps.dim() - 1)))
    if gaps.device.type == "cpu":
        np.exp(gaps.numpy(), out=gaps.numpy())
        return gaps
    return gaps.exp_()


def _block_mass(blocks: Blocks, rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """[N, NB] float32: the sum of each block's weights, for rows [N] under scale [N]."""
    num_blocks = blocks.maxima.shape[1]
    device = blocks.values.device
    step = max(1, (_CPU_PIECE if device.type == "cpu" else _GPU_PIECE) // (num_blocks * BLOCK))
    sums = torch.empty((len(rows), num_blocks), dtype=torch.float32, device=device)
    for first in range(0, len(sums), step):
        part = slice(first, first + step)
        gaps = blocks.values.index_select(0, rows[part])
        torch.sub(blocks.top[rows[part], None, None], gaps, out=gaps)
        torch.sum(_weights(gaps, scale[part]), dim=-1, out=sums[part])
    return sums


def _draw_plain(blocks: Blocks, numbers: _Numbers, edges: torch.Tensor) -> torch.Tensor:
    """Nothing filtered: find the block by its edges [N, NB] float64, then weigh that block alone again."""
    block, rest = _find(edges, numbers.uniforms)
    gaps = blocks.top[numbers.rows, None] - blocks.values[numbers.rows, block]
    return block * BLOCK + _find_within(_weights(gaps, numbers.scale), rest)


def _draw_narrow(
    blocks: Blocks, numbers: _Numbers, mass: torch.Tensor, num_blocks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Look only at the `num_blocks` blocks with the largest maxima. Returns tokens [N] and which of them are settled
    [N] bool: those whose kept tokens surely all are in these blocks.
    """
    order = blocks.maxima[numbers.rows].topk(num_blocks + 1, dim=-1)
    top = blocks.top[numbers.rows]
    horizon = top - order.values[:, -1]  # every token with a smaller gap is among the candidates
    chosen = order.indices[:, :-1].sort(dim=-1).values  # token order
    gaps = top[:, None, None] - blocks.values[numbers.rows[:, None], chosen]
    limit, before_top_p = _limits(gaps.flatten(1), numbers, mass)
    # Where the mass is not given, it was summed up to the other filters' limit, which must be within sight too.
    settled = (limit < horizon) & (~mass.isnan() | (before_top_p < horizon))
    place = _draw_below(gaps, limit, numbers)
    return chosen.gather(1, (place // BLOCK)[:, None])[:, 0] * BLOCK + place % BLOCK, settled


def _limits(gaps: torch.Tensor, numbers: _Numbers, mass: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest gap kept, [N], by all filters and by min_p and top_k alone.

    gaps: [N, C]. mass: [N] float64, the sum that top_p is a part of; NaN = what min_p and top_k keep.
    """
    ordered = _ascending(gaps)
    last = ordered.shape[1] - 1
    kth = ordered.gather(1, (numbers.top_k - 1).clamp(max=last)[:, None])[:, 0]
    bounded = torch.minimum(numbers.max_gap, torch.where(numbers.top_k > last, torch.inf, kth))
    sums = _weights(ordered.clone(), numbers.scale).cumsum(dim=-1, dtype=torch.float64)
    last_kept = (torch.searchsorted(ordered, bounded[:, None], right=True) - 1).clamp(min=0)
    wanted = numbers.top_p * torch.where(mass.isnan(), sums.gather(1, last_kept)[:, 0], mass)
    # The token that crosses the wanted mass is kept. Where the mass is never reached, top_p keeps all.
    crossing = torch.searchsorted(sums, wanted[:, None])
    nucleus = ordered.gather(1, crossing.clamp(max=last))[:, 0]
    nucleus = torch.where((numbers.top_p < 1) & (crossing[:, 0] <= last), nucleus, torch.inf)
    return torch.minimum(bounded, nucleus), bounded


def _ascending(x: torch.Tensor) -> torch.Tensor:
    """Sorted values; on a CPU numpy's vectorised sort is many times faster than torch's, which also makes indices."""
    if x.device.type == "cpu":
        return torch.from_numpy(np.sort(x.numpy(), axis=-1))
    return x.sort(dim=-1).values


def _draw_below(gaps: torch.Tensor, limit: torch.Tensor, numbers: _Numbers) -> torch.Tensor:
    """[N] int64: the place in gaps [N, NB, BLOCK], flattened, of the token drawn among those with gap <= limit.
    Overwrites gaps.
    """
    dropped = gaps > limit[:, None, None]
    weights = _weights(gaps, numbers.scale).masked_fill_(dropped, 0.0)
    block, rest = _find(weights.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64), numbers.uniforms)
    chosen = weights[torch.arange(len(block), device=block.device), block]
    return block * BLOCK + _find_within(chosen, rest)


def _find(edges: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The block [N] whose part of the CDF holds each uniform, and how far into it [N]. edges: [N, NB] float64,
    ascending.
    """
    target = torch.minimum(uniforms * edges[:, -1], _just_below(edges[:, -1]))
    block = torch.searchsorted(edges, target[:, None], right=True)
    block.clamp_(max=edges.shape[1] - 1)  # only NaN gets here
    below = torch.where(block > 0, edges.gather(1, (block - 1).clamp(min=0)), 0.0)
    return block[:, 0], target - below[:, 0]


def _find_within(weights: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """The place in weights [N, BLOCK] whose part of the block holds `rest` [N]; never one that weighs nothing."""
    edges = weights.cumsum(dim=-1, dtype=torch.float64)
    # The block's own sum was rounded to float32 and may exceed this one.
    target = torch.minimum(rest, _just_below(edges[:, -1]))
    return torch.searchsorted(edges, target[:, None], right=True)[:, 0].clamp_(max=weights.shape[1] - 1)


def _just_below(x: torch.Tensor) -> torch.Tensor:
    return torch.nextafter(x, torch.zeros_like(x))

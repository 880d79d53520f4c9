"""Largest logits, draws and log probabilities. Shapes and contracts: `octavo.kernels.ops`.

A draw works on a row's *gaps*, its largest logit minus each logit. All three filters are then one threshold: keep the
tokens whose gap is at most `limit`. A kept token's weight is exp(-gap / temperature), so the most likely one weighs 1.

The CDF runs in token order, not in order of probability: where two logits change places by a rounding error, edges move
by as much as the error and the same uniform finds the same token almost surely; sorted, the two would swap whole
intervals. It is summed in two levels, within blocks in float32, over blocks in float64, so that a row's total needs one
reading of its logits and blocks without kept tokens can be left out without changing a bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from octavo.kernels.sampling import BLOCK, Draws, Logprobs, Masks, Peaks

# Elements worked on at a time, so that memory beyond the logits stays bounded.
_PIECE = 1 << 24


def find_peaks(logits: torch.Tensor) -> Peaks:
    blocks = _blocks(logits)
    maxima = blocks.amax(dim=-1)
    top = maxima.amax(dim=-1)
    rows = torch.arange(len(logits), device=logits.device)
    block = maxima.argmax(dim=-1)
    token_ids = block * BLOCK + blocks[rows, block].argmax(dim=-1)
    return Peaks(maxima, top, token_ids.masked_fill_(~top.isfinite(), 0))


def mask_logits(logits: torch.Tensor, masks: Masks) -> None:
    vocab = logits.shape[1]
    places = torch.arange(32, dtype=torch.int32, device=logits.device)
    step = max(1, _PIECE // vocab)
    for first in range(0, len(masks.rows), step):
        rows = torch.from_numpy(masks.rows[first : first + step]).to(logits.device)
        allowed = (masks.bits[first : first + step, :, None] >> places) & 1
        logits[rows] = logits[rows].masked_fill_(allowed.flatten(1)[:, :vocab] == 0, -torch.inf)


def draw(logits: torch.Tensor, peaks: Peaks, draws: Draws) -> torch.Tensor:
    vocab = logits.shape[1]
    tokens = torch.zeros(len(draws.rows), dtype=torch.int64, device=logits.device)
    # Which rows are filtered is asked on the host, since a device must not be waited for.
    plain = (draws.top_k >= vocab) & (draws.min_p <= 0) & (draws.top_p >= 1)
    step = max(1, _PIECE // vocab)
    for rows in (np.flatnonzero(plain), np.flatnonzero(~plain)):
        for first in range(0, len(rows), step):
            part = rows[first : first + step]
            numbers = _Numbers.of(draws.pick(part), logits.device)
            gaps = peaks.top[numbers.rows, None, None] - _blocks(logits[numbers.rows])
            limit = torch.full_like(numbers.scale, torch.inf) if plain[part[0]] else _limits(gaps, numbers, vocab)
            token_ids = _draw_below(gaps, limit, numbers)
            tokens[torch.from_numpy(part).to(logits.device)] = token_ids
    return tokens.masked_fill_(~peaks.top[torch.from_numpy(draws.rows).to(logits.device)].isfinite(), 0)


def take_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, k: int) -> Logprobs:
    blocks = _blocks(logits)
    maxima = blocks.amax(dim=-1)
    top = maxima.amax(dim=-1)
    gaps = top[:, None, None] - blocks
    total = _weights(gaps, torch.ones_like(top)).sum(dim=-1).sum(dim=-1, dtype=torch.float64)
    normaliser = top + total.log().to(torch.float32)
    own = logits.gather(1, token_ids[:, None])
    ranks = 1 + torch.count_nonzero(logits > own, dim=-1)
    values, ids = most_likely(logits, maxima, k)
    return Logprobs(token_ids, _finite(own[:, 0] - normaliser), ranks, ids, _finite(values - normaliser[:, None]))


def most_likely(logits: torch.Tensor, maxima: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of logits [N, V] and their tokens [N, k] int64, descending. maxima: [N, NB], of the blocks."""
    if k * 4 > maxima.shape[1]:
        return logits.topk(k, dim=-1)
    # The k blocks with the largest maxima hold k tokens that no other token exceeds.
    chosen = maxima.topk(k, dim=-1).indices.sort(dim=-1).values
    rows = torch.arange(len(logits), device=logits.device)[:, None]
    values, place = _blocks(logits)[rows, chosen].flatten(1).topk(k, dim=-1)
    return values, chosen.gather(1, place // BLOCK) * BLOCK + place % BLOCK


@dataclass(frozen=True, slots=True)
class _Numbers:
    """Draws as device tensors [N]. scale: float32, 1/temperature; max_gap: float32, the largest gap min_p keeps."""

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


def _blocks(logits: torch.Tensor) -> torch.Tensor:
    """[R, V] → [R, NB, BLOCK], padded with -inf; not copied where BLOCK divides V."""
    vocab = logits.shape[1]
    if vocab % BLOCK:
        logits = torch.nn.functional.pad(logits, (0, -vocab % BLOCK), value=-torch.inf)
    return logits.view(len(logits), -(-vocab // BLOCK), BLOCK)


def _weights(gaps: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """exp(-gap * scale) in place. gaps: [N, ...] float32, scale: [N].

    On a CPU by numpy: torch.exp takes up to twenty times as long on subnormal results, which most of a vocabulary is
    at low temperature, and torch.exp2 rounds the ends of its vectors differently, so that a row would depend on its
    neighbours.
    """
    gaps.mul_(-scale.view(-1, *[1] * (gaps.dim() - 1)))
    if gaps.device.type == "cpu":
        np.exp(gaps.numpy(), out=gaps.numpy())
        return gaps
    return gaps.exp_()


def _limits(gaps: torch.Tensor, numbers: _Numbers, vocab: int) -> torch.Tensor:
    """[N] float32: the largest gap kept. gaps: [N, NB, BLOCK].

    Tokens that tie at the threshold are all kept, so that the kept set is a property of the row and not of a sort.
    (vLLM keeps ties of top_k likewise; at the edge of top_p it leaves them to its sort.) top_p is a part of what min_p
    and top_k keep.
    """
    ordered = _ascending(gaps.flatten(1))
    last = ordered.shape[1] - 1
    kth = ordered.gather(1, (numbers.top_k - 1).clamp(max=last)[:, None])[:, 0]
    bounded = torch.minimum(numbers.max_gap, torch.where(numbers.top_k >= vocab, torch.inf, kth))
    sums = _weights(ordered.clone(), numbers.scale).cumsum(dim=-1, dtype=torch.float64)
    last_kept = (torch.searchsorted(ordered, bounded[:, None], right=True) - 1).clamp(min=0)
    wanted = numbers.top_p[:, None] * sums.gather(1, last_kept)
    # The token that crosses the wanted mass is kept. Where the mass is never reached, top_p keeps all.
    crossing = torch.searchsorted(sums, wanted)
    nucleus = ordered.gather(1, crossing.clamp(max=last))[:, 0]
    nucleus = torch.where((numbers.top_p < 1) & (crossing[:, 0] <= last), nucleus, torch.inf)
    return torch.minimum(bounded, nucleus)


def _ascending(x: torch.Tensor) -> torch.Tensor:
    """Sorted values; on a CPU numpy's vectorised sort is many times faster than torch's, which also makes indices."""
    if x.device.type == "cpu":
        return torch.from_numpy(np.sort(x.numpy(), axis=-1))
    return x.sort(dim=-1).values


def _draw_below(gaps: torch.Tensor, limit: torch.Tensor, numbers: _Numbers) -> torch.Tensor:
    """[N] int64: the tokens drawn among those with gap <= limit. Overwrites gaps [N, NB, BLOCK]."""
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


def _finite(logprobs: torch.Tensor) -> torch.Tensor:
    return logprobs.nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)

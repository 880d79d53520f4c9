"""Log probabilities. Shapes and contract: `octavo.kernels.ops.TakeLogprobs`.

Reads the logits three times: maxima of blocks, sums of weights, ranks. The k most likely tokens come from the k blocks
with the largest maxima, as `ref` finds them.
"""

import torch
import triton
import triton.language as tl

from octavo.kernels.ref.sampling import most_likely
from octavo.kernels.sampling import Logprobs
from octavo.kernels.triton.block_sums import sum_blocks
from octavo.kernels.triton.peaks import find_peaks

TOKENS = 2048  # that a program ranks
WARPS = 8


@triton.jit
def _finite(logprob):
    return tl.where(logprob < float("inf"), logprob, -float("inf"))  # NaN too


@triton.jit(do_not_specialize=["k"])
def _normalise(
    own,  # [N]
    values,  # [N, k]: logits, become log probabilities
    token_ids,  # [N] int64
    sums,  # [N, blocks] float64
    logits,  # [N, vocab]
    tops,  # [N]
    vocab,
    blocks,
    k,
    ALL: tl.constexpr,  # blocks, to the next power of two
    TOKENS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, ALL)
    total = tl.sum(tl.load(sums + row * blocks + block, mask=block < blocks, other=0.0))
    normaliser = tl.load(tops + row) + tl.log(total).to(tl.float32)
    logit = tl.load(logits + row * vocab + tl.load(token_ids + row))
    tl.store(own + row, _finite(logit - normaliser))
    for first in range(0, k, TOKENS):
        place = first + tl.arange(0, TOKENS)
        x = tl.load(values + row * k + place, mask=place < k, other=0.0)
        tl.store(values + row * k + place, _finite(x - normaliser), mask=place < k)


@triton.jit
def _count_greater(
    ranks,  # [N] int64, 1 before
    token_ids,  # [N] int64
    logits,  # [N, vocab]
    vocab,
    TOKENS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    own = tl.load(logits + row * vocab + tl.load(token_ids + row))
    x = tl.load(logits + row * vocab + token, mask=token < vocab, other=-float("inf"))
    tl.atomic_add(ranks + row, tl.sum((x > own).to(tl.int64)))  # integers: in any order


def take_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, k: int) -> Logprobs:
    peaks = find_peaks(logits)
    (rows, vocab), blocks, device = logits.shape, peaks.maxima.shape[1], logits.device
    values, ids = most_likely(logits, peaks.maxima, k)
    own, ranks = torch.empty(rows, device=device), torch.ones(rows, dtype=torch.int64, device=device)
    if not rows:
        return Logprobs(token_ids, own, ranks, ids, values)
    sums = torch.empty(rows, blocks, dtype=torch.float64, device=device)
    every = torch.arange(rows, dtype=torch.float64, device=device)
    limits = torch.full((rows,), torch.inf, device=device)
    sum_blocks(sums, logits, peaks.maxima, peaks.top, every, torch.ones_like(every), limits)
    values, whole = values.contiguous(), triton.next_power_of_2(blocks)
    _normalise[(rows,)](
        own, values, token_ids, sums, logits, peaks.top, vocab, blocks, k, ALL=whole, TOKENS=TOKENS, num_warps=WARPS
    )
    grid = (rows, triton.cdiv(vocab, TOKENS))
    _count_greater[grid](ranks, token_ids, logits, vocab, TOKENS=TOKENS, num_warps=WARPS)
    return Logprobs(token_ids, own, ranks, ids, values)

"""Log probabilities of drawn and of prompt tokens, from raw logits.

Knows logits and token ids. Does not know sampling: whoever calls hands over logits that no mask, penalty or
temperature has touched. What is computed stays on the device until somebody asks for TokenLogprobs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from octavo.engine.runner.sampler_draw import BLOCK, Blocks, row_sums
from octavo.engine.types import TokenLogprobs

# Elements of a prompt's logits worked on at a time, so that extra memory stays below a few hundred MiB.
_PIECE = 1 << 24


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Of N tokens, on the device. own: [N] float32, the tokens' own log probabilities; ranks: [N] int64, 1 = most
    likely.

    ids: [N, K] int64 and values: [N, K] float32, the K most likely tokens, descending.
    """

    token_ids: torch.Tensor
    own: torch.Tensor
    ranks: torch.Tensor
    ids: torch.Tensor
    values: torch.Tensor

    def parts(self) -> tuple[torch.Tensor, ...]:
        return self.token_ids, self.own, self.ranks, self.ids, self.values


def take_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, k: int) -> Logprobs:
    """Log-softmax of logits [N, V] float32 at token_ids [N] int64 and at the k most likely tokens; k = -1: at all V.

    A token's rank is one plus the number of strictly greater logits. Among equal logits at the edge of the k, any may
    be among them. Log probabilities that would be NaN (a broken model's) become -inf.
    """
    blocks = Blocks.of(logits)
    normaliser = blocks.top + row_sums(blocks).log().to(torch.float32)
    own = logits.gather(1, token_ids[:, None])
    ranks = 1 + _count_greater(logits, own)
    vocab_size = logits.shape[1]
    k = vocab_size if k == -1 else min(k, vocab_size)
    if k * 4 > blocks.maxima.shape[1]:
        values, ids = logits.topk(k, dim=-1)
    else:
        # The k blocks with the largest maxima hold k tokens that no other token exceeds.
        chosen = blocks.maxima.topk(k, dim=-1).indices.sort(dim=-1).values
        rows = torch.arange(len(logits), device=logits.device)[:, None]
        values, place = blocks.values[rows, chosen].flatten(1).topk(k, dim=-1)
        ids = chosen.gather(1, place // BLOCK) * BLOCK + place % BLOCK
    return Logprobs(token_ids, _finite(own[:, 0] - normaliser), ranks, ids, _finite(values - normaliser[:, None]))


def to_token_logprobs(parts: tuple[torch.Tensor, ...], ks: tuple[int, ...]) -> tuple[TokenLogprobs, ...]:
    """Host values from `Logprobs.parts()`, moved to the host. ks: per token how many of the most likely to keep; -1 =
    all.
    """
    token_ids, own, ranks, ids, values = (part.tolist() for part in parts)
    return tuple(
        TokenLogprobs((token_ids[i], *_head(ids[i], k)), (own[i], *_head(values[i], k)), ranks[i])
        for i, k in enumerate(ks)
    )


def prompt_logprobs(logits: torch.Tensor, target_ids: torch.Tensor, k: int) -> tuple[TokenLogprobs, ...]:
    """One entry per row: of target_ids [N] (the prompt's next tokens) under logits [N, V]; k as in `take_logprobs`.

    Waits for the device. Works in pieces of rows, so that what it needs beyond the logits stays bounded.
    """
    result: list[TokenLogprobs] = []
    step = max(1, _PIECE // logits.shape[1])
    for first in range(0, len(logits), step):
        piece = logits[first : first + step].to(torch.float32)
        taken = take_logprobs(piece, target_ids[first : first + step].to(logits.device), k)
        result.extend(to_token_logprobs(taken.parts(), (k,) * len(piece)))
    return tuple(result)


def _count_greater(logits: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """[N] int64: how many of logits [N, V] exceed own [N, 1]. On a CPU numpy counts many times faster than torch."""
    greater = logits > own
    if logits.device.type != "cpu":
        return torch.count_nonzero(greater, dim=-1)
    return torch.tensor([np.count_nonzero(row) for row in greater.numpy()], dtype=torch.int64)


def _head(values: list[int] | list[float], k: int) -> list[int] | list[float]:
    return values if k == -1 else values[:k]


def _finite(logprobs: torch.Tensor) -> torch.Tensor:
    return logprobs.nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)

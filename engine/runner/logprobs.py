"""Log probabilities of drawn and of prompt tokens, from raw logits, as the host hands them out.

Knows logits and token ids. Does not know sampling: whoever calls hands over logits that no mask, penalty or
temperature has touched. The op `take_logprobs` computes them.
"""

from __future__ import annotations

import torch

from octavo.engine.types import TokenLogprobs
from octavo.kernels.ops import Ops

# Elements of a prompt's logits worked on at a time, so that extra memory stays below a few hundred MiB.
_PIECE = 1 << 24


def to_token_logprobs(parts: tuple[torch.Tensor, ...], ks: tuple[int, ...]) -> tuple[TokenLogprobs, ...]:
    """Host values from `Logprobs.parts()`, moved to the host. ks: per token how many of the most likely to keep; -1 =
    all.
    """
    token_ids, own, ranks, ids, values = (part.tolist() for part in parts)
    return tuple(
        TokenLogprobs((token_ids[i], *_head(ids[i], k)), (own[i], *_head(values[i], k)), ranks[i])
        for i, k in enumerate(ks)
    )


def prompt_logprobs(ops: Ops, logits: torch.Tensor, target_ids: torch.Tensor, k: int) -> tuple[TokenLogprobs, ...]:
    """One entry per row: of target_ids [N] (the prompt's next tokens) under logits [N, V], with the k most likely
    tokens; k = -1: all V.

    Waits for the device. Works in pieces of rows, so that what it needs beyond the logits stays bounded.
    """
    result: list[TokenLogprobs] = []
    vocab_size = logits.shape[1]
    step = max(1, _PIECE // vocab_size)
    most = vocab_size if k == -1 else min(k, vocab_size)
    for first in range(0, len(logits), step):
        piece = logits[first : first + step].to(torch.float32).contiguous()
        taken = ops.take_logprobs(piece, target_ids[first : first + step].to(logits.device), most)
        result.extend(to_token_logprobs(taken.parts(), (k,) * len(piece)))
    return tuple(result)


def _head(values: list[int] | list[float], k: int) -> list[int] | list[float]:
    return values if k == -1 else values[:k]

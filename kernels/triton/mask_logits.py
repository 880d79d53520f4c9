"""What grammars and lists of tokens forbid. Shapes and contract: `octavo.kernels.ops.MaskLogits`.

Only words of bits are read, and only forbidden logits written.
"""

import torch
import triton
import triton.language as tl

from octavo.kernels.sampling import Masks
from octavo.kernels.send import send
from octavo.kernels.triton.peaks import check_logits

WORDS = 128  # of 32 tokens, a program's
WARPS = 4


@triton.jit
def _mask_logits(
    logits,  # [R, vocab]
    rows,  # [N] int64
    bits,  # [N, words] int32
    vocab,
    words,
    WORDS: tl.constexpr,
):
    mask = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + mask)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    allowed = tl.load(bits + mask * words + word, mask=word < words, other=-1)
    place = tl.arange(0, 32)
    token = word[:, None] * 32 + place[None, :]
    forbidden = ((allowed[:, None] >> place[None, :]) & 1) == 0
    tl.store(logits + row * vocab + token, -float("inf"), mask=forbidden & (token < vocab))


def mask_logits(logits: torch.Tensor, masks: Masks) -> None:
    check_logits(logits)
    if len(masks.rows):
        mask_rows(logits, send(masks.rows, logits.device), masks.bits)


def mask_rows(logits: torch.Tensor, rows: torch.Tensor, bits: torch.Tensor) -> None:
    """rows: [N] int64 and bits: [N, words] int32, on the device: for graphs, which read them anew in every replay."""
    vocab, words = logits.shape[1], bits.shape[1]
    grid = (len(rows), triton.cdiv(words, WORDS))
    _mask_logits[grid](logits, rows, bits, vocab, words, WORDS=WORDS, num_warps=WARPS)

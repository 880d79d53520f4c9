"""What the sampling ops take and give. Signatures: `octavo.kernels.ops`; definitions: `octavo.kernels.ref.sampling` and
`octavo.kernels.ref.penalties`.

Knows tensors and per-row numbers. Does not know slots, or where a mask or a uniform comes from.

A vocabulary is handled in blocks of BLOCK tokens, the last one shorter: NB blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

BLOCK = 64

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Peaks:
    """The largest logits of R rows.

    maxima: [R, NB] float32, of each block. top: [R] float32, of the row. Both NaN where they span one.
    token_ids: [R] int64, the lowest id that has `top`; 0 where that is not finite.
    """

    maxima: torch.Tensor
    top: torch.Tensor
    token_ids: torch.Tensor


@dataclass(frozen=True, slots=True)
class Masks:
    """What N rows of a step may draw. rows: [N] host, their places in the batch, each once. bits: [N, ceil(V / 32)]
    int32 contiguous, on the device of the logits: token t is bit t % 32 of word t // 32.
    """

    rows: Ints
    bits: torch.Tensor


@dataclass(frozen=True, slots=True)
class Tallies:
    """What penalties are counted by, at P places, each of one sequence; on the device of the logits, contiguous.

    counts: [P, V] int32, how often each token was put out. known: [P, V] bool, the tokens a penalty can touch: those
    put out, and with a repetition penalty those of the prompt. seen: [P, W] int64 and num_seen: [P] int64, the known
    ones as a list, each once, so that a penalty reads the few tokens it changes and not the vocabulary. Entries past a
    list's end are any token ids; there is at least one.
    """

    counts: torch.Tensor
    known: torch.Tensor
    seen: torch.Tensor
    num_seen: torch.Tensor


@dataclass(frozen=True, slots=True)
class Penalised:
    """Which N rows of a step are penalised, and how. Host arrays [N].

    rows: their places in the batch, each once. places: in the tallies, each once. repetition, frequency, presence:
    float32. longest: no row's list is longer; at most the lists' W.
    """

    rows: Ints
    places: Ints
    repetition: npt.NDArray[np.float32]
    frequency: npt.NDArray[np.float32]
    presence: npt.NDArray[np.float32]
    longest: int

    def numbers(self) -> Floats:
        """[5, N]: what a body on a device reads."""
        return np.stack([self.rows, self.places, self.repetition, self.frequency, self.presence]).astype(np.float64)


@dataclass(frozen=True, slots=True)
class Draws:
    """How N rows of a step are drawn. Host arrays [N], contiguous.

    rows: their places in the batch. temperature: above 0. top_k: at least 1; the vocabulary size or more = all. top_p:
    in (0, 1]. min_p: in [0, 1]. uniforms: in (0, 1).
    """

    rows: Ints
    temperature: Floats
    top_k: Ints
    top_p: Floats
    min_p: Floats
    uniforms: Floats

    def numbers(self) -> Floats:
        """[6, N]: a row each for rows, 1 / temperature and the largest gap that min_p keeps (both as float32 has them),
        top_k, top_p and uniforms: what a body on a device reads.
        """
        with np.errstate(divide="ignore"):  # min_p 0 keeps every gap
            max_gap = -np.log(self.min_p) * self.temperature
        scale = 1.0 / self.temperature
        as_float32 = (column.astype(np.float32) for column in (scale, max_gap))
        return np.stack([self.rows, *as_float32, self.top_k, self.top_p, self.uniforms]).astype(np.float64)

    def filtered(self, vocab: int) -> bool:
        """Whether any row may not draw every token."""
        return bool(((self.top_k < vocab) | (self.min_p > 0) | (self.top_p < 1)).any())

    def pick(self, which: npt.NDArray[np.bool_] | Ints) -> Draws:
        return Draws(
            self.rows[which],
            self.temperature[which],
            self.top_k[which],
            self.top_p[which],
            self.min_p[which],
            self.uniforms[which],
        )


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Of N tokens, on the device of the logits. own: [N] float32, the tokens' own log probabilities; ranks: [N] int64,
    1 = most likely.

    ids: [N, K] int64 and values: [N, K] float32, the K most likely tokens, descending.
    """

    token_ids: torch.Tensor
    own: torch.Tensor
    ranks: torch.Tensor
    ids: torch.Tensor
    values: torch.Tensor

    def parts(self) -> tuple[torch.Tensor, ...]:
        return self.token_ids, self.own, self.ranks, self.ids, self.values

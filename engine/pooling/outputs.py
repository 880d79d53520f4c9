"""What `LLM.embed`, `classify`, `score` and `encode` return; vLLM's shapes, with lists in place of tensors."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class PoolingOutput:
    """data: the vector as the model gave it: an embedding, or one score per class."""

    data: list[float]


@dataclass(slots=True)
class EmbeddingOutput:
    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        return len(self.embedding)


@dataclass(slots=True)
class ClassificationOutput:
    """probs: one per class, in the order of the model's labels."""

    probs: list[float]

    @property
    def num_classes(self) -> int:
        return len(self.probs)


@dataclass(slots=True)
class ScoringOutput:
    """score: how well two texts fit: a cross-encoder's, or the cosine of their embeddings."""

    score: float


@dataclass(slots=True)
class PoolingRequestOutput(Generic[T]):
    """One prompt's result. Of a score that took two prompts, the tokens of both."""

    request_id: str
    outputs: T
    prompt_token_ids: list[int] = field(default_factory=list)
    num_cached_tokens: int = 0
    finished: bool = True


EmbeddingRequestOutput = PoolingRequestOutput[EmbeddingOutput]
ClassificationRequestOutput = PoolingRequestOutput[ClassificationOutput]
ScoringRequestOutput = PoolingRequestOutput[ScoringOutput]


def floats(pooled: bytes) -> list[float]:
    """TokenDelta.pooled as numbers."""
    values = array("f", pooled)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tolist()


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    """0 where either has no length."""
    product = sum(x * y for x, y in zip(one, other, strict=True))
    lengths = (sum(x * x for x in one) * sum(y * y for y in other)) ** 0.5
    return product / lengths if lengths else 0.0


def paired(count: int, other: int) -> list[int]:
    """Of `other` second texts, the first text that each belongs to: its own, or the only one. Raises ValueError."""
    if count not in (1, other):
        raise ValueError(
            f"{count} first texts cannot be paired with {other} second ones: there must be one, or as many"
        )
    return [0] * other if count == 1 else list(range(other))

"""PoolingParams: what becomes of the hidden states of a prompt, for requests that generate nothing. No torch here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from octavo.engine.errors import RequestError

Task = Literal["embed", "classify"]
PoolingType = Literal["last", "mean", "cls"]


@dataclass(frozen=True, slots=True)
class PoolingParams:
    """One vector of one prompt: its embedding, or the scores of the model's classes. Names are vLLM's.

    task: embed or classify. pooling_type: which hidden states are taken: the last token's, the mean of all, the first
    token's (cls); None = the model's own way. normalize: embeddings of length 1; None = the model's own way.
    dimensions: of an embedding trained so that its beginning is one too (Matryoshka); None = all. use_activation: class
    scores as probabilities, else as logits, None = true; of embeddings, another name of normalize.
    skip_reading_prefix_cache: None = only where it would spoil the result.

    Raises RequestError, naming the field, for a value that can never be meant. What fits the model is decided by
    `PoolingInfo.resolve`, which leaves nothing but the cache field open.
    """

    task: Task = "embed"
    pooling_type: PoolingType | None = None
    normalize: bool | None = None
    dimensions: int | None = None
    use_activation: bool | None = None
    skip_reading_prefix_cache: bool | None = None

    def __post_init__(self) -> None:
        _one_of("task", self.task, get_args(Task))
        if self.pooling_type is not None:
            _one_of("pooling_type", self.pooling_type, get_args(PoolingType))
        for name in ("normalize", "use_activation", "skip_reading_prefix_cache"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, bool):
                raise RequestError(f"{name} must be true or false, got {value!r}.", name)
        size = self.dimensions
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise RequestError(f"dimensions must be an integer of at least 1, got {size!r}.", "dimensions")

    @property
    def reads_cache(self) -> bool:
        """Whether a prompt's beginning may be taken from the prefix cache: only where nothing of it is pooled."""
        return not self.skip_reading_prefix_cache and self.pooling_type == "last"

    def replace(self, **changes: Any) -> PoolingParams:
        """A copy with `changes`, validated anew."""
        return dataclasses.replace(self, **changes)


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise RequestError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.", name)

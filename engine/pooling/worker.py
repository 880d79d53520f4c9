"""Pooler: hidden states of a step in, finished vectors out. The torch half, on every rank of the last stage.

Knows slots, rows and a model that turns vectors into classes. Does not know requests or blocks. A prompt that is
computed in chunks is summed up as its rows come, in float64, so that how it was cut does not show.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from octavo.engine.core.plan import NewSequence, Row, RowResult
from octavo.engine.pooling.params import PoolingParams

Ints = npt.NDArray[np.int64]

NOT_FINITE = "The model's hidden states are not finite."


class Model(Protocol):
    """What the pooler asks of a model (see octavo.engine.layers.decoder.CausalLM)."""

    score: nn.Module | None

    def features(self, pooled: torch.Tensor) -> torch.Tensor: ...


@dataclass(slots=True)
class _Pooled:
    """A sequence in its slot. so_far: [M]: the sum of the positions computed (mean, float64), or the one wanted."""

    params: PoolingParams
    num_prompt: int
    so_far: torch.Tensor | None = None


class Pooler:
    """`enter` and `leave` follow the plans; `pool` takes each step's result. activation: of class scores."""

    def __init__(self, model: Model, activation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._model, self._activation = model, activation
        self._slots: dict[int, _Pooled] = {}

    def __bool__(self) -> bool:
        """Whether any slot is pooled."""
        return bool(self._slots)

    def enter(self, new: NewSequence) -> None:
        """A sequence enters its slot; only those that are pooled are kept."""
        if new.pooling is not None:
            self._slots[new.slot] = _Pooled(new.pooling, new.num_prompt)

    def leave(self, slot: int) -> None:
        self._slots.pop(slot, None)

    def pool(self, rows: Sequence[Row], last: Ints, hidden: torch.Tensor) -> dict[int, RowResult]:
        """Results of the rows, by their place, that end a prompt. last: index in T of each row's last token; hidden:
        [T, M], which may be overwritten after."""
        if not self._slots:
            return {}
        ended: dict[int, _Pooled] = {}
        for place, row in enumerate(rows):
            sequence = self._slots.get(row.slot)
            if sequence is None:
                continue
            end = int(last[place]) + 1
            self._take(sequence, row, hidden[end - row.num_tokens : end])
            if row.start + row.num_tokens == sequence.num_prompt:
                ended[place] = sequence
        if not ended:
            return {}
        vectors = self._model.features(torch.stack([_vector(sequence) for sequence in ended.values()]).to(hidden.dtype))
        finished = [
            self._finish(sequence.params, vector) for sequence, vector in zip(ended.values(), vectors, strict=True)
        ]
        sizes = [len(vector) for vector in finished]
        on_host = torch.split(torch.cat(finished).cpu(), sizes)  # a device is waited for once
        return {place: _result(values) for place, values in zip(ended, on_host, strict=True)}

    def _take(self, sequence: _Pooled, row: Row, hidden: torch.Tensor) -> None:
        """hidden: [N, M] of the row's positions."""
        match sequence.params.pooling_type:
            case "mean":
                total = hidden.sum(dim=0, dtype=torch.float64)
                sequence.so_far = total if sequence.so_far is None else sequence.so_far + total
            case "cls":
                if row.start == 0:
                    sequence.so_far = hidden[0].clone()
            case _:
                if row.start + row.num_tokens == sequence.num_prompt:
                    sequence.so_far = hidden[-1].clone()

    def _finish(self, params: PoolingParams, vector: torch.Tensor) -> torch.Tensor:
        """vector: [E] of one sequence → float32. By itself, so that it is the same in any company."""
        if params.task == "classify":
            assert self._model.score is not None, "the model has no classes"
            logits = self._model.score(vector.unsqueeze(0))[0].float()
            return self._activation(logits) if params.use_activation else logits
        vector = vector.float()
        if params.dimensions is not None:
            vector = vector[: params.dimensions]
        return F.normalize(vector, dim=0) if params.normalize else vector


def _vector(sequence: _Pooled) -> torch.Tensor:
    assert sequence.so_far is not None, "nothing was computed of the sequence"
    return sequence.so_far / sequence.num_prompt if sequence.params.pooling_type == "mean" else sequence.so_far.double()


def _result(values: torch.Tensor) -> RowResult:
    if not bool(values.isfinite().all()):
        return RowResult(error=NOT_FINITE)
    return RowResult(pooled=values.numpy().astype("<f4", copy=False).tobytes())


def activation_of(hf_config: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """How a checkpoint's logits [C] become scores: as it says; else one class by the logistic function, several by the
    softmax. Sources: transformers' problem_type, sentence_transformers' CrossEncoder.get_default_activation_fn."""
    told = getattr(hf_config, "sentence_transformers", None) or {}
    named = told.get("activation_fn") or getattr(hf_config, "sbert_ce_default_activation_function", None)
    kind = str(named).rpartition(".")[2] if named else None
    problem = getattr(hf_config, "problem_type", None)
    if kind == "Identity" or (kind is None and problem == "regression"):
        return lambda logits: logits
    if kind == "Sigmoid" or problem == "multi_label_classification" or hf_config.num_labels == 1:
        return torch.sigmoid
    return lambda logits: torch.softmax(logits, dim=-1)

"""Checkpoints: what a model is and its weights, tensor by tensor, whatever the files look like.

What a checkpoint offers; `folder` and `gguf` know the formats. Nobody here knows models or layers, nor what becomes of
a tensor, and nobody keeps one, so that loading needs little more memory than the model itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import torch

from octavo.engine.layers.weight import Source
from octavo.engine.loader.source import ModelSource
from octavo.engine.types import GenerationDefaults
from octavo.kernels.matrix import Matrix

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Checkpoint(Protocol):
    """An opened checkpoint. Opening checks all that can be checked without reading weights.

    config: a transformers config, names as in config.json. eos_token_ids: tokens that end a sequence.
    num_bytes: of the weights as stored.
    """

    @property
    def config(self) -> PretrainedConfig: ...
    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...
    @property
    def generation_defaults(self) -> GenerationDefaults | None: ...
    @property
    def num_tensors(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...

    def weights(self) -> Iterator[tuple[str, Source]]:
        """As `tensors`, but nothing is read before it is asked for (see `octavo.engine.layers.weight.Stored`)."""
        ...

    def tensors(self) -> Iterator[tuple[str, torch.Tensor | Matrix]]:
        """(Hugging Face name, weight on the CPU), each once, in file order; do not write into one. May be called again.

        A quantized matrix is a Matrix, [outputs, inputs] as its layer multiplies, also where Hugging Face's tensor of
        that name is its transpose.
        """
        ...


def open_checkpoint(source: ModelSource, *, trust_remote_code: bool = False, weights: bool = True) -> Checkpoint:
    """Open what `resolve_model` found. Raises ConfigError naming the file that is missing or damaged.

    trust_remote_code: let a config.json name Python code in the same folder that builds the config. weights false: a
    folder need hold none, and the checkpoint has none.
    """
    if source.kind == "gguf":
        from octavo.engine.loader.gguf import GGUFCheckpoint

        return GGUFCheckpoint(source.path)
    from octavo.engine.loader.folder import open_folder

    return open_folder(source.path, trust_remote_code, weights)

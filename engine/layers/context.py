"""What every layer's constructor is handed: where it lives, which ops it calls, which ranks it shares work with."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from octavo.engine.layers.linear_method import LinearMethod, Unquantized
from octavo.engine.parallel.layout import deal
from octavo.engine.parallel.mesh import Mesh
from octavo.kernels.ops import Ops


@dataclass(frozen=True, slots=True)
class BuildContext:
    """Everything about the build that is not the model's own config.

    dtype: of weights and activations. kv_dtype: that KV is stored in; None = dtype. max_model_len: the longest sequence
    that will be served, in tokens: positions are 0 … max_model_len - 1; None = the model's own limit (`build_model`
    fills it in). How matrices are kept and applied: linear_method those of linear layers, head_method the head's and a
    table tied to it, table_method other tables. whole_products: layers after a cut one do not add up what ranks
    computed of a product (see layers/linear.py, GatheredLinear). lm_head: the model will be asked for logits of tokens.
    """

    mesh: Mesh
    ops: Ops
    dtype: torch.dtype
    device: torch.device
    max_model_len: int | None = None
    kv_dtype: torch.dtype | None = None
    linear_method: LinearMethod = field(default_factory=Unquantized)
    head_method: LinearMethod = field(default_factory=Unquantized)
    table_method: LinearMethod = field(default_factory=Unquantized)
    whole_products: bool = False
    lm_head: bool = True

    @property
    def num_positions(self) -> int:
        assert self.max_model_len is not None, "max_model_len is unresolved"
        return self.max_model_len

    def layers(self, num_layers: int) -> range:
        """Which of the model's layers this stage has."""
        return deal(num_layers, self.mesh.pp.size)[self.mesh.pp.rank]

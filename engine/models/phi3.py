"""Phi-3, Phi-3.5 and Phi-4 (mini): Llama whose checkpoint keeps qkv and gate/up merged."""

from __future__ import annotations

from typing import Any

from octavo.engine.layers.context import BuildContext
from octavo.engine.layers.decoder import WeightNames
from octavo.engine.models.llama import LlamaLike, Traits


class Phi3ForCausalLM(LlamaLike):
    """The merged tensors hold our parts in our order. Partial rotation and LongRoPE come from the rope parameters."""

    weight_names = WeightNames()

    def __init__(self, config: Any, ctx: BuildContext) -> None:
        super().__init__(config, ctx, Traits(windows=(config.sliding_window,) * config.num_hidden_layers))

"""Qwen2 and Qwen2.5: Llama with biases on query, key and value, and a window in the upper layers if asked for."""

from __future__ import annotations

from typing import Any

from octavo.engine.layers.context import BuildContext
from octavo.engine.models.llama import LlamaLike, Traits, windows_by_layer_type


class Qwen2ForCausalLM(LlamaLike):
    """use_sliding_window and max_window_layers are already worked into the config's `layer_types`."""

    def __init__(self, config: Any, ctx: BuildContext) -> None:
        super().__init__(config, ctx, Traits(windows=windows_by_layer_type(config), qkv_bias=True))

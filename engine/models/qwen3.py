"""Qwen3 (dense): Llama with RMS norms over each query and key head."""

from __future__ import annotations

from typing import Any

from octavo.engine.layers.context import BuildContext
from octavo.engine.models.llama import LlamaLike, Traits, windows_by_layer_type


class Qwen3ForCausalLM(LlamaLike):
    """use_sliding_window and max_window_layers are already worked into the config's `layer_types`."""

    def __init__(self, config: Any, ctx: BuildContext) -> None:
        bias = config.attention_bias
        traits = Traits(windows=windows_by_layer_type(config), qkv_bias=bias, out_bias=bias, qk_norm=True)
        super().__init__(config, ctx, traits)

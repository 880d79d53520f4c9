"""Mistral: Llama with one sliding window in all layers."""

from __future__ import annotations

from typing import Any

from octavo.engine.layers.context import BuildContext
from octavo.engine.models.llama import LlamaLike, Traits


class MistralForCausalLM(LlamaLike):
    """Mistral 7B v0.1 to v0.3, Nemo, Small, Codestral. sliding_window None: no window."""

    def __init__(self, config: Any, ctx: BuildContext) -> None:
        window = getattr(config, "sliding_window", None)
        super().__init__(config, ctx, Traits(windows=(window,) * config.num_hidden_layers))

"""Gemma 3 (text): Gemma 2 with norms on query and key heads, and rope parameters of their own for windowed layers."""

from __future__ import annotations

from typing import Any

from octavo.engine.layers.context import BuildContext
from octavo.engine.layers.rotary import Rotary, rope_parameters
from octavo.engine.models.gemma2 import GemmaLike


class Gemma3ForCausalLM(GemmaLike):
    """270m, 1b, and the text part of the larger ones saved as Gemma3ForCausalLM."""

    def __init__(self, config: Any, ctx: BuildContext) -> None:
        rotaries = {
            kind: Rotary(ctx, rope_parameters(config, kind), config.head_dim, config.max_position_embeddings)
            for kind in sorted(set(config.layer_types))
        }
        super().__init__(config, ctx, rotaries.__getitem__, qk_norm=True)

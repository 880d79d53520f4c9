"""Whether a model can be cut as a layout asks: known from its config, before a weight is read. Imports no torch."""

from __future__ import annotations

from typing import Any

from octavo.engine.errors import ConfigError
from octavo.engine.layers.heads import share_heads
from octavo.engine.parallel.layout import Layout


def check_layout(hf_config: Any, layout: Layout) -> None:
    """Raises ConfigError, one sentence that says what to change."""
    layers, heads = int(hf_config.num_hidden_layers), int(hf_config.num_attention_heads)
    if layout.pp > layers:
        raise ConfigError(
            f"pipeline_parallel_size is {layout.pp}, but the model has {layers} layers: set it to at most {layers}."
        )
    share_heads(heads, int(getattr(hf_config, "num_key_value_heads", None) or heads), layout.tp)
    if layout.tp > inner_size(hf_config):
        raise ConfigError(
            f"tensor_parallel_size is {layout.tp}, but the model's feed-forward blocks are {inner_size(hf_config)} "
            "wide: set it to at most that."
        )


def inner_size(hf_config: Any) -> int:
    """Width of the feed-forward blocks, under whichever name the family's config has it."""
    for name in ("intermediate_size", "ffn_dim", "n_inner"):
        if getattr(hf_config, name, None):
            return int(getattr(hf_config, name))
    return 4 * int(hf_config.hidden_size)

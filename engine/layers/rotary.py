"""Rotary position embedding: the frequencies of every published scaling rule, and the cos/sin table made of them.

Knows Hugging Face's `rope_parameters` (transformers 5) and the older `rope_theta` + `rope_scaling`. A rule whose
frequencies depend on a sequence's length (dynamic NTK, LongRoPE) is fixed to the longest length served: KV is shared
between sequences and kept while they grow, so one position must always be rotated alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from octavo.engine.errors import ConfigError
from octavo.engine.layers.context import BuildContext


class Rotary:
    """Rotates query and key. cos_sin: [P, R] float32, P = the longest sequence served. Shared by layers."""

    def __init__(self, ctx: BuildContext, parameters: Mapping[str, Any], head_size: int, max_position: int) -> None:
        frequencies, scale = rope_frequencies(parameters, head_size, max_position, ctx.num_positions)
        angles = torch.arange(ctx.num_positions, dtype=torch.float32).unsqueeze(1) * frequencies
        self.cos_sin = (torch.cat((angles.cos(), angles.sin()), dim=1) * scale).to(ctx.device)
        self.rotate = ctx.ops.rotary

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """query: [T, Hq, D], key: [T, Hkv, D], positions: [T]. May work in place."""
        return self.rotate(query, key, positions, self.cos_sin)


def rope_parameters(config: Any, layer_type: str | None = None) -> dict[str, Any]:
    """The rope parameters of a Hugging Face config, whichever form it has, as one flat dict with `rope_type`.

    layer_type: for configs that keep one set per kind of layer.
    """
    found = dict(getattr(config, "rope_parameters", None) or {})
    if layer_type is not None and layer_type in found:
        found = dict(found[layer_type])
    if not found:
        found = dict(getattr(config, "rope_scaling", None) or {})
    found["rope_type"] = found.get("rope_type") or found.get("type") or "default"
    if found.get("rope_theta") is None:
        found["rope_theta"] = getattr(config, "rope_theta", None) or 10000.0
    for name in ("partial_rotary_factor", "original_max_position_embeddings"):
        if found.get(name) is None and getattr(config, name, None) is not None:
            found[name] = getattr(config, name)
    return found


@dataclass(frozen=True, slots=True)
class _Lengths:
    trained: int  # max_position_embeddings of the config
    served: int


def rope_frequencies(
    parameters: Mapping[str, Any], head_size: int, max_position: int, max_model_len: int
) -> tuple[torch.Tensor, float]:
    """([R/2] float32 radians per position, factor on cos and sin). R = head_size × partial_rotary_factor.

    Raises ConfigError for an unknown rope_type or a missing parameter.
    """
    kind = parameters["rope_type"]
    if kind not in RULES:
        raise ConfigError(f"rope_type {kind!r} is not supported; supported are {', '.join(RULES)}.")
    rotated = int(head_size * (parameters.get("partial_rotary_factor") or 1.0))
    try:
        return RULES[kind](parameters, rotated, _Lengths(max_position, max_model_len))
    except KeyError as error:
        raise ConfigError(f"The config's rope parameters of type {kind!r} lack {error.args[0]!r}.") from None


def _base(theta: float, rotated: int) -> torch.Tensor:
    return 1.0 / theta ** (torch.arange(0, rotated, 2, dtype=torch.float32) / rotated)


def _default(parameters: Mapping[str, Any], rotated: int, lengths: _Lengths) -> tuple[torch.Tensor, float]:
    return _base(parameters["rope_theta"], rotated), 1.0


def _linear(parameters: Mapping[str, Any], rotated: int, lengths: _Lengths) -> tuple[torch.Tensor, float]:
    return _base(parameters["rope_theta"], rotated) / parameters["factor"], 1.0


def _dynamic(parameters: Mapping[str, Any], rotated: int, lengths: _Lengths) -> tuple[torch.Tensor, float]:
    """NTK-aware: theta grows with the length beyond the trained one."""
    factor, stretch = parameters["factor"], max(lengths.served, lengths.trained) / lengths.trained
    theta = parameters["rope_theta"] * (factor * stretch - (factor - 1)) ** (rotated / (rotated - 2))
    return _base(theta, rotated), 1.0


def _llama3(parameters: Mapping[str, Any], rotated: int, lengths: _Lengths) -> tuple[torch.Tensor, float]:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    frequencies = _base(parameters["rope_theta"], rotated)
    factor, low, high = (parameters[name] for name in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = parameters["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # within the trained length
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / factor), 1.0


def _yarn(parameters: Mapping[str, Any], rotated: int, lengths: _Lengths) -> tuple[torch.Tensor, float]:
    """YaRN, https://arxiv.org/abs/2309.00071: a linear blend over the components, and a softmax temperature."""
    theta, original = parameters["rope_theta"], parameters["original_max_position_embeddings"]
    factor = parameters.get("factor") or lengths.trained / original

    def component(turns: float) -> float:
        """The component that makes `turns` turns within the original length."""
        return rotated * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = component(parameters.get("beta_fast") or 32), component(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    stretched = (torch.arange(rotated // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)
    stretched = stretched.clamp(0, 1)
    frequencies = _base(theta, rotated)
    return frequencies * (stretched / factor + (1 - stretched)), _yarn_scale(parameters, factor)


def _yarn_scale(parameters: Mapping[str, Any], factor: float) -> float:
    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    mscale, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return scale(mscale) / scale(all_dim) if mscale and all_dim else scale(1.0)


def _longrope(parameters: Mapping[str, Any], rotated: int, lengths: _Lengths) -> tuple[torch.Tensor, float]:
    """LongRoPE, https://arxiv.org/abs/2402.13753: a factor per component, one set within the original length and one
    beyond it. Which one is used follows from the longest length served."""
    original = parameters["original_max_position_embeddings"]
    name = "long_factor" if lengths.served > original else "short_factor"
    per_component = torch.tensor(parameters[name], dtype=torch.float32)
    if len(per_component) != rotated // 2:
        raise ConfigError(f"The config's rope {name} must have {rotated // 2} entries, got {len(per_component)}.")
    scale = parameters.get("attention_factor")
    if scale is None:
        factor = parameters.get("factor") or lengths.trained / original
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return _base(parameters["rope_theta"], rotated) / per_component, float(scale)


Rule = Callable[[Mapping[str, Any], int, _Lengths], tuple[torch.Tensor, float]]
RULES: dict[str, Rule] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,
}

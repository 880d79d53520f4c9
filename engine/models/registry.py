"""Which model families there are, and how one is built from a Hugging Face config.

A family's module is imported when it is asked for.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import torch

from octavo.engine.errors import ConfigError
from octavo.engine.layers.context import BuildContext
from octavo.engine.layers.decoder import CausalLM
from octavo.engine.layers.rotary import rope_parameters
from octavo.engine.models.fits import check_layout
from octavo.engine.parallel.layout import Layout
from octavo.engine.parallel.mesh import Mesh

# architecture, as `architectures` of a config.json names it → "module:class" below this package
MODELS: dict[str, str] = {
    "Gemma2ForCausalLM": "gemma2:Gemma2ForCausalLM",
    "Gemma3ForCausalLM": "gemma3:Gemma3ForCausalLM",
    "GPT2LMHeadModel": "gpt2:GPT2LMHeadModel",
    "LlamaForCausalLM": "llama:LlamaForCausalLM",
    "MistralForCausalLM": "mistral:MistralForCausalLM",
    "OPTForCausalLM": "opt:OPTForCausalLM",
    "Phi3ForCausalLM": "phi3:Phi3ForCausalLM",
    "Qwen2ForCausalLM": "qwen2:Qwen2ForCausalLM",
    "Qwen3ForCausalLM": "qwen3:Qwen3ForCausalLM",
}


def build_model(hf_config: Any, ctx: BuildContext) -> CausalLM:
    """This rank's part of a Hugging Face config's model, its weights still zeros (see `octavo.engine.loader.assign`).

    Raises ConfigError for an architecture or a setting that is not supported, and for sizes that do not split over the
    mesh.
    """
    module, name = _family(hf_config).split(":")
    if ctx.max_model_len is None:
        ctx = dataclasses.replace(ctx, max_model_len=max_model_len(hf_config))
    family = getattr(importlib.import_module(f"octavo.engine.models.{module}"), name)
    check_layout(hf_config, Layout(ctx.mesh.tp.size, ctx.mesh.pp.size))
    model: CausalLM = family(hf_config, ctx)
    if ctx.mesh.pp.size > 1:
        model.whole.append(family(hf_config, dataclasses.replace(ctx, mesh=Mesh(), device=torch.device("meta"))))
    return model


def _family(hf_config: Any) -> str:
    architectures = getattr(hf_config, "architectures", None) or []
    for architecture in architectures:
        if architecture in MODELS:
            return MODELS[architecture]
    named = ", ".join(architectures) or f"none named in its config (model type {hf_config.model_type!r})"
    raise ConfigError(f"Architecture {named} is not supported; supported are {', '.join(MODELS)}.")


def max_model_len(hf_config: Any) -> int:
    """The longest sequence the model is made for, in tokens.

    `max_position_embeddings`, times the factor of a rope scaling that extends it (as vLLM counts). Rules whose configs
    already state the extended length (llama3, longrope, one set per layer type) are taken as they are.
    """
    length = int(hf_config.max_position_embeddings)
    parameters = rope_parameters(hf_config)
    factor = parameters.get("factor")
    if factor is None or parameters["rope_type"] not in ("linear", "dynamic", "yarn"):
        return length
    if parameters["rope_type"] == "yarn":
        length = int(parameters.get("original_max_position_embeddings") or length)
    return int(length * factor)

"""Which model families there are, and how one is built from a Hugging Face config.

A family's module is imported when it is asked for.
"""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import dataclass
from typing import Any

import torch

from octavo.engine.errors import ConfigError
from octavo.engine.layers.classifier import PlainLinear
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


# Those that see a prompt in both directions, and generate nothing.
ENCODERS: dict[str, str] = {
    "BertForMaskedLM": "bert:BertModel",
    "BertForSequenceClassification": "bert:BertForSequenceClassification",
    "BertModel": "bert:BertModel",
    "CamembertForMaskedLM": "roberta:RobertaModel",
    "CamembertForSequenceClassification": "roberta:RobertaForSequenceClassification",
    "CamembertModel": "roberta:RobertaModel",
    "DistilBertForMaskedLM": "distilbert:DistilBertModel",
    "DistilBertForSequenceClassification": "distilbert:DistilBertForSequenceClassification",
    "DistilBertModel": "distilbert:DistilBertModel",
    "RobertaForMaskedLM": "roberta:RobertaModel",
    "RobertaForSequenceClassification": "roberta:RobertaForSequenceClassification",
    "RobertaModel": "roberta:RobertaModel",
    "XLMRobertaForMaskedLM": "roberta:RobertaModel",
    "XLMRobertaForSequenceClassification": "roberta:RobertaForSequenceClassification",
    "XLMRobertaModel": "roberta:RobertaModel",
}
CLASSIFIES = "ForSequenceClassification"


@dataclass(frozen=True, slots=True)
class Role:
    """What a checkpoint is served as. family: as in MODELS. is_causal: see PoolingInfo. generates: it has a head over
    the vocabulary. has_classes: it has one over classes. embeds: its hidden states are worth asking for."""

    family: str
    is_causal: bool = True
    generates: bool = False
    has_classes: bool = False
    embeds: bool = True


def role_of(hf_config: Any, runner: str = "auto", convert: str = "auto") -> Role:
    """The role of a Hugging Face config's model, as EngineConfig.runner and convert (see there) leave it.

    Any decoder's bare model (LlamaModel) and its …ForSequenceClassification are as good as the …ForCausalLM. Raises
    ConfigError for an architecture that is not supported, or not for that.
    """
    architectures = getattr(hf_config, "architectures", None) or []
    found = next((role for name in architectures if (role := _natural_role(name)) is not None), None)
    if found is None:
        named = ", ".join(architectures) or f"none named in its config (model type {hf_config.model_type!r})"
        known = ", ".join((*MODELS, *ENCODERS))
        raise ConfigError(f"Architecture {named} is not supported; supported are {known}.")
    if runner == "generate" and not found.generates:
        raise ConfigError(f"runner is generate, but {architectures[0]} has no head to generate with: use runner auto.")
    if convert == "classify" and not found.has_classes:
        raise ConfigError(f"convert is classify, but {architectures[0]} has no classes: use convert auto.")
    if convert == "embed" and not found.embeds:
        raise ConfigError(f"convert is embed, but {architectures[0]} is made for its classes: use convert auto.")
    if runner == "pooling":
        return dataclasses.replace(found, generates=False)
    return dataclasses.replace(found, embeds=found.embeds and not (found.generates and convert == "none"))


def _natural_role(architecture: str) -> Role | None:
    if architecture in MODELS:
        return Role(MODELS[architecture], generates=True)
    classes = architecture.endswith(CLASSIFIES)
    if architecture in ENCODERS:
        return Role(ENCODERS[architecture], is_causal=False, has_classes=classes, embeds=not classes)
    stem = architecture.removesuffix(CLASSIFIES if classes else "Model").removesuffix("Text")
    family = MODELS.get(f"{stem}ForCausalLM") or MODELS.get(f"{stem}LMHeadModel")
    if family is None or stem == architecture:
        return None
    return Role(family, has_classes=classes, embeds=not classes)


def build_model(hf_config: Any, ctx: BuildContext, role: Role | None = None) -> CausalLM:
    """This rank's part of a Hugging Face config's model, its weights still zeros (see `octavo.engine.loader.assign`).

    Raises ConfigError for an architecture or a setting that is not supported, and for sizes that do not split over the
    mesh.
    """
    role = role or role_of(hf_config)
    if ctx.max_model_len is None:
        ctx = dataclasses.replace(ctx, max_model_len=max_model_len(hf_config))
    ctx = dataclasses.replace(ctx, lm_head=role.generates)
    check_layout(hf_config, Layout(ctx.mesh.tp.size, ctx.mesh.pp.size))
    model = _build(hf_config, ctx, role)
    if ctx.mesh.pp.size > 1:
        model.whole.append(_build(hf_config, dataclasses.replace(ctx, mesh=Mesh(), device=torch.device("meta")), role))
    return model


def _build(hf_config: Any, ctx: BuildContext, role: Role) -> CausalLM:
    module, name = role.family.split(":")
    family = getattr(importlib.import_module(f"octavo.engine.models.{module}"), name)
    model: CausalLM = family(hf_config, ctx)
    if role.has_classes and role.is_causal and ctx.mesh.pp.is_last:
        model.score = PlainLinear(ctx, model.feature_size, hf_config.num_labels, bias=False)
    return model


def max_model_len(hf_config: Any) -> int:
    """The longest sequence the model is made for, in tokens.

    `max_position_embeddings`, times the factor of a rope scaling that extends it (as vLLM counts). Rules whose configs
    already state the extended length (llama3, longrope, one set per layer type) are taken as they are.
    """
    length = int(hf_config.max_position_embeddings)
    if hf_config.model_type in ("roberta", "xlm-roberta", "camembert"):  # whose first positions no token has
        length -= int(hf_config.pad_token_id) + 1
    parameters = rope_parameters(hf_config)
    factor = parameters.get("factor")
    if factor is None or parameters["rope_type"] not in ("linear", "dynamic", "yarn"):
        return length
    if parameters["rope_type"] == "yarn":
        length = int(parameters.get("original_max_position_embeddings") or length)
    return int(length * factor)

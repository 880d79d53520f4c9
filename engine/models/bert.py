"""BERT and those that differ from it by names: MiniLM, BGE, E5, GTE and most cross-encoders are BERTs."""

from __future__ import annotations

from typing import Any

import torch

from octavo.engine.errors import ConfigError
from octavo.engine.layers.classifier import Classifier
from octavo.engine.layers.context import BuildContext
from octavo.engine.layers.decoder import WeightNames, WeightTarget
from octavo.engine.layers.encoder import Encoder, EncoderShape

# Longer ones first where one holds another.
_RENAMED = (
    ("embeddings.word_embeddings", "embed_tokens"),
    ("embeddings.position_embeddings", "embed_positions"),
    ("embeddings.token_type_embeddings", "token_types"),
    ("embeddings.LayerNorm", "embed_norm"),
    ("encoder.layer.", "layers."),
    ("attention.self.", "self_attn."),
    ("attention.output.dense", "self_attn.o_proj"),
    ("attention.output.LayerNorm", "attention_norm"),
    ("intermediate.dense", "mlp.up_proj"),
    ("output.dense", "mlp.down_proj"),
    ("output.LayerNorm", "mlp_norm"),
)
QKV: dict[str, str | tuple[str, str]] = {
    "query": ("qkv_proj", "q"),
    "key": ("qkv_proj", "k"),
    "value": ("qkv_proj", "v"),
}


class BertNames(WeightNames):
    """Paths are renamed as a whole, since `output` and `LayerNorm` are several things. gamma, beta: TensorFlow's."""

    def target(self, name: str) -> WeightTarget | None:
        if name.startswith(("cls.", "lm_head.")):  # of pre-training
            return None
        for theirs, ours in _RENAMED:
            name = name.replace(theirs, ours)
        return super().target(name.replace("norm.gamma", "norm.weight").replace("norm.beta", "norm.bias"))


class BertModel(Encoder):
    """Hidden states for embeddings. The pooler, a layer on top of the first token's for pre-training, is not used."""

    weight_names = BertNames(
        prefixes=("bert.",),
        modules=QKV,
        ignored=("position_ids", "token_type_ids", "pooler.dense.weight", "pooler.dense.bias"),
    )

    def __init__(self, config: Any, ctx: BuildContext) -> None:
        super().__init__(ctx, bert_shape(config))


class BertForSequenceClassification(Encoder):
    """Classes, or one score, read off the first token through the pooler."""

    weight_names = BertNames(
        prefixes=("bert.",),
        modules=QKV | {"pooler": "score", "classifier": "score.out"},
        ignored=("position_ids", "token_type_ids"),
    )

    def __init__(self, config: Any, ctx: BuildContext) -> None:
        super().__init__(ctx, bert_shape(config))
        if ctx.mesh.pp.is_last:
            self.score = Classifier(ctx, config.hidden_size, config.num_labels, torch.tanh)


def bert_shape(config: Any, position_offset: int = 0) -> EncoderShape:
    """Raises ConfigError for what is no plain encoder."""
    kind = getattr(config, "position_embedding_type", None) or "absolute"
    if kind != "absolute":
        raise ConfigError(f"position_embedding_type {kind!r} is not supported; supported is absolute.")
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        raise ConfigError("is_decoder or add_cross_attention is set: BERT's family is supported as encoders only.")
    return EncoderShape(
        vocab_size=config.vocab_size,
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        inner=config.intermediate_size,
        activation=config.hidden_act,
        eps=config.layer_norm_eps,
        positions=config.max_position_embeddings,
        position_offset=position_offset,
        token_types=config.type_vocab_size,
    )

"""DistilBERT: BERT without token types and pooler, under names of its own."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from octavo.engine.errors import ConfigError
from octavo.engine.layers.classifier import Classifier
from octavo.engine.layers.context import BuildContext
from octavo.engine.layers.decoder import WeightNames, WeightTarget
from octavo.engine.layers.encoder import Encoder, EncoderShape

_RENAMED = (
    ("embeddings.word_embeddings", "embed_tokens"),
    ("embeddings.position_embeddings", "embed_positions"),
    ("embeddings.LayerNorm", "embed_norm"),
    ("transformer.layer.", "layers."),
    ("attention.out_lin", "self_attn.o_proj"),
    ("attention.", "self_attn."),
    ("sa_layer_norm", "attention_norm"),
    ("output_layer_norm", "mlp_norm"),
    ("ffn.lin1", "mlp.up_proj"),
    ("ffn.lin2", "mlp.down_proj"),
)


class DistilBertNames(WeightNames):
    def target(self, name: str) -> WeightTarget | None:
        if name.startswith(("vocab_", "lm_head.")):  # of pre-training
            return None
        for theirs, ours in _RENAMED:
            name = name.replace(theirs, ours)
        return super().target(name)


class DistilBertModel(Encoder):
    """Hidden states for embeddings."""

    weight_names = DistilBertNames(
        prefixes=("distilbert.",),
        modules={
            "q_lin": ("qkv_proj", "q"),
            "k_lin": ("qkv_proj", "k"),
            "v_lin": ("qkv_proj", "v"),
            "pre_classifier": "score.dense",
            "classifier": "score.out",
        },
        ignored=("position_ids",),
    )

    def __init__(self, config: Any, ctx: BuildContext) -> None:
        if config.sinusoidal_pos_embds:
            raise ConfigError("sinusoidal_pos_embds is set, which is not supported: learned positions are.")
        shape = EncoderShape(
            vocab_size=config.vocab_size,
            width=config.dim,
            layers=config.n_layers,
            heads=config.n_heads,
            inner=config.hidden_dim,
            activation=config.activation,
            eps=1e-12,
            positions=config.max_position_embeddings,
        )
        super().__init__(ctx, shape)


class DistilBertForSequenceClassification(DistilBertModel):
    """Classes, or one score, read off the first token through a dense layer."""

    def __init__(self, config: Any, ctx: BuildContext) -> None:
        super().__init__(config, ctx)
        if ctx.mesh.pp.is_last:
            self.score = Classifier(ctx, config.dim, config.num_labels, F.relu)

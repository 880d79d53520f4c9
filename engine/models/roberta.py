"""RoBERTa, XLM-RoBERTa and CamemBERT: BERT whose positions are counted from behind the padding token's id."""

from __future__ import annotations

from typing import Any

import torch

from octavo.engine.layers.classifier import Classifier
from octavo.engine.layers.context import BuildContext
from octavo.engine.layers.encoder import Encoder
from octavo.engine.models.bert import QKV, BertNames, bert_shape

_PREFIXES = ("roberta.",)


class RobertaModel(Encoder):
    """Hidden states for embeddings: BGE-M3, multilingual E5, all-distilroberta."""

    weight_names = BertNames(
        prefixes=_PREFIXES,
        modules=QKV,
        ignored=("position_ids", "token_type_ids", "pooler.dense.weight", "pooler.dense.bias"),
    )

    def __init__(self, config: Any, ctx: BuildContext) -> None:
        super().__init__(ctx, bert_shape(config, position_offset(config)))


class RobertaForSequenceClassification(Encoder):
    """Classes, or one score, read off the first token through a dense layer of the head's own: BGE rerankers."""

    weight_names = BertNames(
        prefixes=_PREFIXES,
        modules=QKV | {"classifier": "score", "out_proj": "out"},
        ignored=("position_ids", "token_type_ids"),
    )

    def __init__(self, config: Any, ctx: BuildContext) -> None:
        super().__init__(ctx, bert_shape(config, position_offset(config)))
        if ctx.mesh.pp.is_last:
            self.score = Classifier(ctx, config.hidden_size, config.num_labels, torch.tanh)


def position_offset(config: Any) -> int:
    """Rows of the position table that no token uses."""
    return int(config.pad_token_id) + 1

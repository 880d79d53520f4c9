"""Tiny random checkpoints of models that pool, made with transformers, and what transformers computes from them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

VOCAB = 192
MAX_LEN = 128
BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": MAX_LEN,
    "type_vocab_size": 2,
    "pad_token_id": 0,
}
ROBERTA = BERT | {"max_position_embeddings": MAX_LEN + 2, "type_vocab_size": 1, "pad_token_id": 1}
DISTIL = {"vocab_size": VOCAB, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 128}
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LEN,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": VOCAB, "n_positions": MAX_LEN, "n_embd": 32, "n_layer": 3, "n_head": 4, "pad_token_id": 0}

# case → (config class, its arguments, model class)
CASES: dict[str, tuple[str, dict, str]] = {
    "bert": ("BertConfig", BERT, "BertModel"),
    "bert-masked": ("BertConfig", BERT, "BertForMaskedLM"),
    "bert-classes": ("BertConfig", BERT | {"num_labels": 3}, "BertForSequenceClassification"),
    "bert-cross": ("BertConfig", BERT | {"num_labels": 1}, "BertForSequenceClassification"),
    "roberta": ("RobertaConfig", ROBERTA, "RobertaModel"),
    "xlm-roberta": ("XLMRobertaConfig", ROBERTA | {"hidden_act": "gelu_new"}, "XLMRobertaModel"),
    "roberta-classes": ("RobertaConfig", ROBERTA | {"num_labels": 4}, "RobertaForSequenceClassification"),
    "xlm-roberta-cross": ("XLMRobertaConfig", ROBERTA | {"num_labels": 1}, "XLMRobertaForSequenceClassification"),
    "distilbert": ("DistilBertConfig", DISTIL, "DistilBertModel"),
    "distilbert-classes": ("DistilBertConfig", DISTIL | {"num_labels": 2}, "DistilBertForSequenceClassification"),
    "llama-classes": ("LlamaConfig", LLAMA | {"num_labels": 3}, "LlamaForSequenceClassification"),
    "qwen3-cross": ("Qwen3Config", LLAMA | {"num_labels": 1, "head_dim": 8}, "Qwen3ForSequenceClassification"),
    "gpt2-classes": ("GPT2Config", GPT2 | {"num_labels": 2}, "GPT2ForSequenceClassification"),
    "qwen3-bare": ("Qwen3Config", LLAMA | {"head_dim": 8}, "Qwen3Model"),
    "llama": ("LlamaConfig", LLAMA, "LlamaForCausalLM"),
    "opt-narrow": (
        "OPTConfig",
        {name: LLAMA[name] for name in LLAMA if name not in ("intermediate_size", "num_key_value_heads")}
        | {"ffn_dim": 16, "do_layer_norm_before": False, "word_embed_proj_dim": 16},
        "OPTForCausalLM",
    ),
}
ENCODERS = tuple(name for name in CASES if name.startswith(("bert", "roberta", "xlm", "distil")))
CLASSIFIERS = tuple(name for name in CASES if name.endswith(("-classes", "-cross")))


def model(name: str) -> PreTrainedModel:
    """The transformers model of a case in float32, the same weights every time."""
    kind, arguments, architecture = CASES[name]
    special = {"bos_token_id": None, "eos_token_id": None}
    with torch.random.fork_rng():
        torch.manual_seed(zlib.crc32(name.encode()))
        config = getattr(transformers, kind)(**(special | arguments), attn_implementation="eager")
        made = getattr(transformers, architecture)(config).eval()
        with torch.no_grad():
            for path, parameter in made.named_parameters():
                wide = parameter.dim() > 1
                centre = 0.0 if wide or path.endswith("bias") else 1.0
                parameter.normal_(centre, 0.3 if wide else 0.15)
    made.config.architectures = [architecture]
    return made


def make(name: str, folder: Path) -> Path:
    """Save the case as `folder`/`name`: config.json and model.safetensors, no tokenizer. Returns that folder."""
    path = Path(folder) / name
    if not path.exists():
        model(name).save_pretrained(path)
    return path


def prompts(lengths: Sequence[int] = (5, 23, 1, 40, 17, 23, 9), seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


@torch.inference_mode()
def hidden_states(reference: PreTrainedModel, ids: Sequence[int], second_from: int | None = None) -> torch.Tensor:
    """[len(ids), M]: what the model without its heads makes of one prompt. second_from: where token type 1 begins."""
    arguments = {"input_ids": torch.tensor([list(ids)])}
    if second_from is not None:
        arguments["token_type_ids"] = (torch.arange(len(ids)) >= second_from).long()[None]
    return reference.base_model(**arguments).last_hidden_state[0]


@torch.inference_mode()
def logits(reference: PreTrainedModel, ids: Sequence[int], second_from: int | None = None) -> torch.Tensor:
    """[C] of a classifier."""
    arguments = {"input_ids": torch.tensor([list(ids)])}
    if second_from is not None:
        arguments["token_type_ids"] = (torch.arange(len(ids)) >= second_from).long()[None]
    return reference(**arguments).logits[0].float()


def pooled(states: torch.Tensor, how: str, normalize: bool = True) -> torch.Tensor:
    """By the definition."""
    vector = {"last": states[-1], "cls": states[0], "mean": states.mean(dim=0)}[how]
    return torch.nn.functional.normalize(vector, dim=0) if normalize else vector

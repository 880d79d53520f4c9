"""Time to load weights ÷ time to read their files: python benchmarks/load_weights.py [--device cuda]

A random Llama checkpoint is written in each number format and deleted at the end. Then, in turn, round by round: its
files are read from one end to the other into one buffer (the floor), into memory of their own (what a load on a CPU
must at least do), and loaded by octavo: built, read, converted, on the device. `warm`: the system has the files in
memory; `cold`: it was told to forget them before each (which a file system may ignore; look at the GB/s). Printed:
medians, and the ratios' medians over rounds. Goal: at most 1.5 times the floor.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from report import save, show, table
from safetensors.torch import save_file

GOAL = 1.5
BUFFER = 16 << 20
SHARD = 512 << 20
FORMATS: dict[str, dict[str, Any] | None] = {
    "bfloat16": None,
    "float32": None,
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"},
}
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32768,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of each round."""

    format: str
    state: str
    num_bytes: int
    read: list[float]
    own: list[float]
    load: list[float]

    def median(self, seconds: list[float]) -> float:
        return statistics.median(seconds)

    def ratio(self, floor: list[float]) -> float:
        return statistics.median(load / least for load, least in zip(self.load, floor, strict=True))


def write(folder: Path, kind: str, num_bytes: int) -> None:
    """A checkpoint of about so many bytes, in shards."""
    from octavo.engine.quant.drawn import Dice, draw
    from octavo.engine.quant.scheme import read_scheme

    width, inner, vocab, heads = 2048, 8192, 32768, 512
    shapes = {"q": (width, width), "k": (heads, width), "v": (heads, width), "o": (width, width)}
    names = {f"self_attn.{name}_proj": shape for name, shape in shapes.items()}
    names |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
    bytes_each = {"float32": 4.0, "bfloat16": 2.0, "fp8": 1.0}.get(kind, 0.52)
    table_bytes = 2 * vocab * width * (4 if kind == "float32" else 2)
    layer_bytes = sum(rows * columns for rows, columns in names.values()) * bytes_each
    layers = max(1, round((num_bytes - table_bytes) / layer_bytes))
    config = SHAPE | {"num_hidden_layers": layers, "torch_dtype": "float32" if kind == "float32" else "bfloat16"}
    if FORMATS[kind] is not None:
        config["quantization_config"] = FORMATS[kind]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    found: Any = argparse.Namespace(quantization_config=FORMATS[kind])
    scheme, dtype = read_scheme(found), torch.float32 if kind == "float32" else torch.bfloat16

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        host = torch.device("cpu")
        yield "model.embed_tokens.weight", Dice("embed", host).numbers("", (vocab, width), dtype)
        for i in range(layers):
            for name, shape in names.items():
                key = f"model.layers.{i}.{name}"
                format = None if scheme is None else scheme.format_of(key)
                if format is None:
                    yield f"{key}.weight", Dice(key, host).numbers("", shape, dtype)
                    continue
                for piece, tensor in draw(format, *shape, Dice(key, host), Dice(key, host)).items():
                    yield f"{key}.{piece}", tensor.contiguous()
            for norm in ("input", "post_attention"):
                yield f"model.layers.{i}.{norm}_layernorm.weight", torch.ones(width, dtype=dtype)
        yield "model.norm.weight", torch.ones(width, dtype=dtype)
        yield "lm_head.weight", Dice("head", host).numbers("", (vocab, width), dtype)

    shard: dict[str, torch.Tensor] = {}
    number = 0
    for name, tensor in tensors():
        shard[name] = tensor
        if sum(part.nbytes for part in shard.values()) >= SHARD:
            save_file(shard, folder / f"model-{number:05}.safetensors")
            shard, number = {}, number + 1
    if shard:
        save_file(shard, folder / f"model-{number:05}.safetensors")
    os.sync()


def read(files: list[Path]) -> None:
    buffer = bytearray(BUFFER)
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def read_into_own(files: list[Path]) -> None:
    kept = []
    for path in files:
        kept.append(torch.empty(path.stat().st_size, dtype=torch.uint8))
        view, at = memoryview(kept[-1].numpy()), 0
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(view[at : at + BUFFER]):
                at += count


def forget(files: list[Path]) -> None:
    for path in files:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def loader(folder: Path, device: torch.device, dtype: str) -> Callable[[], None]:
    """Builds and loads the folder's model; what is not part of that has been done."""
    from octavo.engine.build import Phases
    from octavo.engine.config import EngineConfig
    from octavo.engine.parallel.mesh import Mesh
    from octavo.engine.runner.build import build_part

    config = EngineConfig(
        model=str(folder), device=device.type, dtype=dtype, max_model_len=256, kv_cache_memory_bytes=1 << 26
    )

    def load() -> float:
        phases = Phases(None)
        part = build_part(config, Mesh(), phases)
        seconds = dict(phases.done)  # loading waits for the device at its end
        part.close()
        return seconds["build model"] + seconds["load weights"]

    return load


def measure(kind: str, folder: Path, device: torch.device, rounds: int, states: list[str]) -> Iterator[Times]:
    files = sorted(folder.glob("*.safetensors"))
    load = loader(folder, device, "float32" if kind == "float32" else "bfloat16")
    load()  # libraries, kernels
    for state in states:
        times = Times(kind, state, sum(path.stat().st_size for path in files), [], [], [])
        for _ in range(rounds):
            for seconds, work in ((times.read, read), (times.own, read_into_own), (times.load, lambda _: load())):
                gc.collect()
                forget(files) if state == "cold" else read(files)
                started = time.perf_counter()
                found = work(files)
                seconds.append(time.perf_counter() - started if found is None else found)
        yield times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS)[:4], choices=list(FORMATS))
    parser.add_argument("--states", nargs="+", default=["warm", "cold"], choices=["warm", "cold"])
    parser.add_argument("--gigabytes", type=float, default=1.2, help="of each checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--folder", type=Path, help="where to write checkpoints (default: the system's for such)")
    parser.add_argument("--output", type=Path, help="result file (default: build/benchmarks/)")
    args = parser.parse_args()
    found: list[Times] = []
    place = Path(tempfile.mkdtemp(prefix="octavo-load-", dir=args.folder))
    try:
        for kind in args.formats:
            write(place / kind, kind, int(args.gigabytes * 1e9))
            found += measure(kind, place / kind, torch.device(args.device), args.rounds, args.states)
            shutil.rmtree(place / kind)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    columns = table(
        ("format", "files", "GB", "read GB/s", "own GB/s", "load GB/s", "load ÷ own", "load ÷ read", "goal")
    )
    for times in found:
        size = times.num_bytes / 1e9
        speeds = (f"{size / times.median(part):.2f}" for part in (times.read, times.own, times.load))
        met = "met" if times.ratio(times.read) <= GOAL else "missed"
        ratios = (f"{times.ratio(times.own):.2f}", f"{times.ratio(times.read):.2f}")
        columns.add_row(times.format, times.state, f"{size:.2f}", *speeds, *ratios, f"≤ {GOAL}: {met}")
    show(f"loading weights on {args.device}", columns)
    save("load_weights", vars(args), [asdict(times) for times in found], args.output)


if __name__ == "__main__":
    main()

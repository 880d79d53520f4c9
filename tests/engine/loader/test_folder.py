"""Hugging Face folders: safetensors, pickles, what is missing and what is damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from octavo.engine.errors import ConfigError
from octavo.engine.loader.checkpoint import Checkpoint, GenerationDefaults, open_checkpoint
from octavo.engine.loader.source import ModelSource

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 16,
    "rope_theta": 5000.0,
    "eos_token_id": [2, 7],
}
TENSORS = {f"model.t{i}.weight": torch.full((4, 3), float(i)) for i in range(5)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def opened(folder: Path, **options: Any) -> Checkpoint:
    return open_checkpoint(ModelSource("folder", folder, "m", "m"), **options)


def check_tensors(checkpoint: Checkpoint) -> None:
    for _ in range(2):  # it can be walked again
        found = dict(checkpoint.tensors())
        assert set(found) == set(TENSORS)
        assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    assert checkpoint.num_tensors == len(TENSORS)


def write_shards(folder: Path, names: list[str], index: str | None) -> None:
    items = list(TENSORS.items())
    parts = [dict(items[:3]), dict(items[3:])]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name) if name.endswith("safetensors") else torch.save(part, folder / name)
    if index is not None:
        weight_map = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_one_file(folder: Path) -> None:
    save_file(TENSORS, folder / "model.safetensors")
    checkpoint = opened(folder)
    check_tensors(checkpoint)
    assert checkpoint.num_bytes == 5 * 4 * 3 * 4
    assert checkpoint.config.model_type == "llama"
    assert checkpoint.config.rope_parameters["rope_theta"] == 5000.0


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
PICKLES = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]


@pytest.mark.parametrize("names", [SHARDS, PICKLES], ids=["safetensors", "torch"])
@pytest.mark.parametrize("with_index", [True, False])
def test_shards(names: list[str], with_index: bool, folder: Path) -> None:
    stem = "model.safetensors" if names is SHARDS else "pytorch_model.bin"
    write_shards(folder, names, f"{stem}.index.json" if with_index else None)
    check_tensors(opened(folder))
    (folder / names[1]).unlink()
    if with_index:
        with pytest.raises(ConfigError, match=f"incomplete: {names[1]}, listed in"):
            opened(folder)


def test_file_order_is_kept(folder: Path) -> None:
    tensors = {name: torch.zeros(2) for name in ("z", "a", "m")}
    header = {
        name: {"dtype": "F32", "shape": [2], "data_offsets": [8 * i, 8 * i + 8]} for i, name in enumerate(tensors)
    }
    raw = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(24))
    assert [name for name, _ in opened(folder).tensors()] == ["z", "a", "m"]


def test_the_publishers_second_copy_is_left_out(folder: Path) -> None:
    save_file(TENSORS, folder / "model.safetensors")
    save_file({"other.name": torch.zeros(1)}, folder / "consolidated.safetensors")
    check_tensors(opened(folder))


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle(zipped: bool, folder: Path) -> None:
    torch.save(TENSORS, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    check_tensors(opened(folder))


def test_safetensors_come_before_pickles(folder: Path) -> None:
    save_file(TENSORS, folder / "model.safetensors")
    torch.save({"other": torch.zeros(1)}, folder / "pytorch_model.bin")
    check_tensors(opened(folder))


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("code ran",))


def test_pickles_run_no_code(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin is damaged, or holds more than tensors"):
        list(opened(folder).tensors())
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_cut_off_safetensors(keep: int, folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ConfigError, match=r"model\.safetensors is (cut off|not a safetensors file)"):
        opened(folder)


def test_cut_off_pickle(folder: Path) -> None:
    path = folder / "pytorch_model.bin"
    torch.save(TENSORS, path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin is damaged"):
        list(opened(folder).tensors())


def test_git_lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(ConfigError, match="Git LFS pointer"):
        opened(folder)


def test_no_weights(folder: Path) -> None:
    with pytest.raises(ConfigError, match="holds no weights"):
        opened(folder)
    (folder / "q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"holds q4\.gguf: give the path"):
        opened(folder)


def test_no_config(folder: Path) -> None:
    save_file(TENSORS, folder / "model.safetensors")
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"no config\.json"):
        opened(folder)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"model_type": "no-such-model"}', '{"model_type": "llama", "vocab_size": "x"}']
)
def test_bad_config(text: str, folder: Path) -> None:
    save_file(TENSORS, folder / "model.safetensors")
    (folder / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        opened(folder)


def test_code_of_the_folder_is_not_run_unasked(folder: Path) -> None:
    save_file(TENSORS, folder / "model.safetensors")
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.MineConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text("raise SystemExit('code ran')")
    with pytest.raises(ConfigError, match="trust_remote_code"):
        opened(folder)


def test_end_tokens(folder: Path) -> None:
    save_file(TENSORS, folder / "model.safetensors")
    assert opened(folder).eos_token_ids == (2, 7)
    generation = folder / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": 9}))
    assert opened(folder).eos_token_ids == (9,)
    generation.write_text(json.dumps({"eos_token_id": "</s>"}))
    with pytest.raises(ConfigError, match="eos_token_id must be a number"):
        opened(folder)


def test_generation_defaults(folder: Path) -> None:
    save_file(TENSORS, folder / "model.safetensors")
    assert opened(folder).generation_defaults is None
    generation = folder / "generation_config.json"
    generation.write_text(json.dumps({"temperature": 0.7, "top_k": 20, "do_sample": True, "max_new_tokens": None}))
    assert opened(folder).generation_defaults == GenerationDefaults(temperature=0.7, top_k=20)
    generation.write_text(json.dumps({"top_p": "high"}))
    with pytest.raises(ConfigError, match="top_p must be a number"):
        opened(folder)


def test_memory_stays_near_one_tensor(folder: Path) -> None:
    """Walking the tensors without keeping them keeps none of them: freed before the next is read."""
    import weakref

    save_file(TENSORS, folder / "model.safetensors")
    alive: list[weakref.ref[torch.Tensor]] = []
    for _, tensor in opened(folder).tensors():
        alive = [ref for ref in alive if ref() is not None]
        assert len(alive) <= 1
        alive.append(weakref.ref(tensor))

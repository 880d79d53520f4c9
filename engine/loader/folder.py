"""A Hugging Face model folder as a checkpoint: its JSON files, and weights as safetensors or pickles.

Does not know what the config's fields mean to a model.
"""

from __future__ import annotations

import json
import math
import pickle
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from octavo.engine.errors import ConfigError
from octavo.engine.layers.weight import Source
from octavo.engine.loader.checkpoint import Checkpoint
from octavo.engine.loader.file_tensor import FileTensor, OpenFile
from octavo.engine.loader.weight_files import find_weights, read_json
from octavo.engine.types import GenerationDefaults

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def open_folder(folder: Path, trust_remote_code: bool, weights: bool = True) -> Checkpoint:
    """weights false: look for none. Raises ConfigError naming the file that is missing or damaged."""
    if not weights:
        return SafetensorsCheckpoint(FolderSettings(folder, trust_remote_code), ())
    found = find_weights(folder)
    settings = FolderSettings(folder, trust_remote_code)
    if found.format == "safetensors":
        return SafetensorsCheckpoint(settings, found.files)
    return TorchCheckpoint(settings, found.files)


class FolderSettings:
    """config.json and generation_config.json of a folder."""

    def __init__(self, folder: Path, trust_remote_code: bool) -> None:
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{folder} holds no config.json: it is not a Hugging Face model folder.")
        self._folder = folder
        generation = folder / "generation_config.json"
        self._generation = read_json(generation) if generation.is_file() else {}
        self.config = _load_config(folder, trust_remote_code)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """From generation_config.json, else from config.json (its text part, if the model is more than text)."""
        found = self._generation.get("eos_token_id")
        if found is None:
            found = getattr(self.config.get_text_config(), "eos_token_id", None)
        found = [] if found is None else found if isinstance(found, list) else [found]
        if not all(isinstance(token, int) for token in found):
            raise ConfigError(f"{self._folder}: eos_token_id must be a number or a list of them, but is {found!r}.")
        return tuple(found)

    @property
    def generation_defaults(self) -> GenerationDefaults | None:
        """What generation_config.json states; None where it is absent or recommends nothing."""
        max_tokens = self._number("max_new_tokens")
        top_k = self._number("top_k")
        defaults = GenerationDefaults(
            temperature=self._number("temperature"),
            top_p=self._number("top_p"),
            top_k=None if top_k is None else int(top_k),
            min_p=self._number("min_p"),
            repetition_penalty=self._number("repetition_penalty"),
            max_tokens=None if max_tokens is None else int(max_tokens),
        )
        return None if defaults == GenerationDefaults() else defaults

    def _number(self, key: str) -> float | None:
        value = self._generation.get(key)
        if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
            return value
        raise ConfigError(f"{self._folder / 'generation_config.json'}: {key} must be a number, but is {value!r}.")


def _load_config(folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    from transformers import AutoConfig  # takes a second or two to import

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # transformers raises anything here, validation errors of other libraries included
        reason = " ".join(str(error).split())
        raise ConfigError(f"transformers cannot make a config of {folder / 'config.json'}: {reason}") from error


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor of a safetensors file. offset: bytes from the file's beginning."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _FolderCheckpoint:
    """What both formats of weights have in common."""

    def __init__(self, settings: FolderSettings, files: tuple[Path, ...]) -> None:
        self.config: PretrainedConfig = settings.config
        self.eos_token_ids = settings.eos_token_ids
        self.generation_defaults = settings.generation_defaults
        self.files = files

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        raise NotImplementedError

    def weights(self) -> Iterator[tuple[str, Source]]:
        """The tensors themselves: they are views of the mapped files."""
        return self.tensors()


class SafetensorsCheckpoint(_FolderCheckpoint):
    """One or more safetensors files, mapped into memory. The tensors are views of them: read when they are used."""

    def __init__(self, settings: FolderSettings, files: tuple[Path, ...]) -> None:
        super().__init__(settings, files)
        self._entries = {path: _entries(path) for path in files}

    @property
    def num_tensors(self) -> int:
        return sum(len(entries) for entries in self._entries.values())

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entries in self._entries.values() for entry in entries)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, tensor.read()) for name, tensor in self._stored())

    def weights(self) -> Iterator[tuple[str, Source]]:
        """Vectors, which are small and taken whole, are read; matrices are not."""
        return ((name, tensor if len(tensor.shape) > 1 else tensor.load()) for name, tensor in self._stored())

    def _stored(self) -> Iterator[tuple[str, FileTensor]]:
        for path, entries in self._entries.items():
            file = OpenFile(path)
            for entry in entries:
                yield entry.name, FileTensor.of(file, entry.dtype, entry.shape, entry.offset)


_DTYPES = {
    **{"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32},
    **{"I64": torch.int64, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64},
    **{"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu},
}


def _entries(path: Path) -> tuple[_Entry, ...]:
    """The tensors of a safetensors file in the order they lie in it. Raises ConfigError for a damaged or cut off file.

    Source: the format's description, github.com/huggingface/safetensors.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            (length,) = struct.unpack("<Q", start)
            size = path.stat().st_size
            header: dict[str, Any] = json.loads(file.read(length)) if length <= size else {}
        entries = [_entry(path, name, header[name], 8 + length) for name in header if name != "__metadata__"]
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror or error}.") from error
    except (struct.error, ValueError, KeyError, TypeError, IndexError) as error:
        raise ConfigError(f"{path} is not a safetensors file, or it is damaged.{_lfs_hint(start)}") from error
    end = max((entry.offset + entry.num_bytes for entry in entries), default=8 + length)
    if end > size:
        raise ConfigError(f"{path} is cut off: {size} of {end} bytes are there.{_lfs_hint(start)} Download it again.")
    return tuple(sorted(entries, key=lambda entry: entry.offset))


def _entry(path: Path, name: str, said: dict[str, Any], start: int) -> _Entry:
    """said: of a tensor in the header. start: of the file's data."""
    kind, (first, end), shape = said["dtype"], said["data_offsets"], tuple(said["shape"])
    if kind not in _DTYPES:
        raise ConfigError(f"{path}: tensor {name!r} is of type {kind}; supported are {', '.join(_DTYPES)}.")
    entry = _Entry(name, _DTYPES[kind], shape, start + first)
    if entry.num_bytes != end - first:
        raise ValueError(name)
    return entry


def _lfs_hint(start: bytes) -> str:
    """A file that git has not fetched holds a note of where to get it."""
    return " It is a Git LFS pointer: run `git lfs pull` there." if start.startswith(b"version ") else ""


class TorchCheckpoint(_FolderCheckpoint):
    """pytorch_model.bin, whole or in shards: pickles, read with torch's safe unpickler (tensors only, no code)."""

    @cached_property
    def num_tensors(self) -> int:
        """Reads the pickles, but not the weights."""
        return sum(len(_load_pickle(path)) for path in self.files)

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for path in self.files:
            state = _load_pickle(path)
            for name in list(state):
                yield name, state.pop(name)


def _load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Mapped into memory where the file's form allows it (all but those of torch before 1.6)."""
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        with open(path, "rb") as file:
            hint = _lfs_hint(file.read(8))
        raise ConfigError(f"{path} is damaged, or holds more than tensors.{hint}") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ConfigError(f"{path} does not hold a dict of tensors.")
    return state

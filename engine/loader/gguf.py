"""A GGUF file as a checkpoint: Hugging Face's names, Hugging Face's values, a transformers config.

Knows how files, header, names, config and blocks fit together; what each means is in its own module.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from octavo.engine.errors import ConfigError
from octavo.engine.layers.weight import Source, read
from octavo.engine.loader.file_tensor import Arrival, Expected, FileTensor, InFile, OpenFile
from octavo.engine.loader.gguf_blocks import TYPES, TensorType, dequantize, matrix
from octavo.engine.loader.gguf_config import Facts, make_config
from octavo.engine.loader.gguf_header import Header, TensorInfo, read_header
from octavo.engine.loader.gguf_names import IGNORED, RULES, Place, row_order
from octavo.engine.types import GenerationDefaults
from octavo.kernels.matrix import Matrix

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Types we have no decoder for, by name, for the error message.
_OTHER_TYPES = {
    10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL",
    21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M",
    34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
# Tokens that end an assistant's turn in the common chat formats. Converters often leave them out of the metadata.
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>")
_CONTROL_TOKEN = 3  # in tokenizer.ggml.token_type
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True, slots=True)
class _Stored:
    """One tensor: the file it is in, its place in it, how it is stored, and where it belongs."""

    path: Path
    info: TensorInfo
    kind: TensorType
    place: Place

    @property
    def num_weights(self) -> int:
        return math.prod(self.info.shape)

    @property
    def num_bytes(self) -> int:
        return self.kind.num_bytes(self.num_weights)


@dataclass(frozen=True, slots=True)
class StoredBlocks:
    """A quantized matrix in its file (see `octavo.engine.layers.weight.Stored`).

    raw: [N, bytes of a row] uint8. rows: which of them, in the order wanted; columns: of weights.
    """

    raw: FileTensor | Expected
    kind: TensorType
    rows: range | torch.Tensor
    columns: range

    @classmethod
    def of(cls, file: OpenFile, stored: _Stored, order: torch.Tensor | None) -> StoredBlocks:
        (rows, columns), kind = stored.info.shape, stored.kind
        raw = FileTensor.of(file, torch.uint8, (rows, kind.num_bytes(columns)), stored.info.offset)
        return cls(raw, kind, range(rows) if order is None else order, range(columns))

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), len(self.columns)

    @property
    def nbytes(self) -> int:
        return self.raw.nbytes

    def narrow(self, axis: int, start: int, size: int) -> StoredBlocks:
        if axis == 0:
            return replace(self, rows=self.rows[start : start + size])
        return replace(self, columns=self.columns[start : start + size])

    def read(self) -> Matrix:
        """On the device where the blocks are. Raises ValueError where groups cannot be cut."""
        weights, columns, taken = self.kind.weights, self.columns, self._taken().read()
        if not isinstance(self.rows, range):
            taken = taken[self.rows.to(taken.device)]
        first, width = columns.start // weights * weights, taken.shape[1] // self.kind.size * weights
        whole = matrix(taken.flatten(), self.kind, (len(taken), width))
        return whole.narrow(1, columns.start - first, len(columns))

    def slices(self) -> Iterator[FileTensor]:
        """See `octavo.engine.loader.file_tensor.InFile`."""
        return self._taken().slices()

    def expecting(self, arrivals: Mapping[FileTensor, Arrival]) -> StoredBlocks:
        return replace(self, raw=self.raw.expecting(arrivals))

    def _taken(self) -> FileTensor | Expected:
        """Whole blocks; all rows where they come in another order."""
        weights, size = self.kind.weights, self.kind.size
        first, last = self.columns.start // weights, -(-self.columns.stop // weights)
        raw = self.raw.narrow(1, first * size, (last - first) * size)
        return raw.narrow(0, self.rows.start, len(self.rows)) if isinstance(self.rows, range) else raw


@dataclass(frozen=True, slots=True)
class StoredRows:
    """An unquantized tensor in its file, whose rows come in another order. order: [N] int64."""

    tensor: torch.Tensor | FileTensor | Expected
    order: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.order), *self.tensor.shape[1:])

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def narrow(self, axis: int, start: int, size: int) -> StoredRows:
        if axis == 0:
            return replace(self, order=self.order[start : start + size])
        return replace(self, tensor=self.tensor.narrow(axis, start, size))

    def read(self) -> torch.Tensor:
        tensor = read(self.tensor)
        assert isinstance(tensor, torch.Tensor)
        return tensor[self.order.to(tensor.device)]

    def slices(self) -> Iterator[FileTensor]:
        """See `octavo.engine.loader.file_tensor.InFile`."""
        return self.tensor.slices() if isinstance(self.tensor, InFile) else iter(())

    def expecting(self, arrivals: Mapping[FileTensor, Arrival]) -> StoredRows:
        return replace(self, tensor=self.tensor.expecting(arrivals)) if isinstance(self.tensor, InFile) else self


class GGUFCheckpoint:
    """A `.gguf` file, or the first of a split one (`…-00001-of-00003.gguf`).

    Quantized matrices are given as such, other tensors as they are stored. Everything that can be wrong with the file,
    other than its numbers, is found on opening. Raises ConfigError.
    """

    def __init__(self, path: Path) -> None:
        headers = {part: read_header(part, want=_is_wanted) for part in _parts(path)}
        first = next(iter(headers.values()))
        self._metadata = first.metadata
        facts = _facts(path, headers)
        self.config: PretrainedConfig = make_config(facts)
        self._stored = _place_all(headers, facts)

    @property
    def num_tensors(self) -> int:
        return len(self._stored)

    @property
    def num_bytes(self) -> int:
        """As stored."""
        return sum(stored.num_bytes for stored in self._stored)

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end token, and the end-of-turn and end-of-message tokens of chat models, named or recognised by text."""
        named = [self._metadata.get(f"tokenizer.ggml.{key}_token_id", int) for key in ("eos", "eot", "eom")]
        tokens = self._metadata.get("tokenizer.ggml.tokens", list, [])
        kinds = self._metadata.get("tokenizer.ggml.token_type", list, [])
        ids = {token: i for i, token in enumerate(tokens or []) if token in _END_OF_TURN}
        turns = [i for i in ids.values() if kinds and i < len(kinds) and kinds[i] == _CONTROL_TOKEN]
        return tuple(dict.fromkeys(token for token in [*named, *sorted(turns)] if token is not None))

    @property
    def generation_defaults(self) -> GenerationDefaults | None:
        """From `general.sampling.*`, where a converter has kept the model's recommendations."""

        def number(key: str) -> float | None:
            return self._metadata.get(f"general.sampling.{key}", float)

        defaults = GenerationDefaults(
            temperature=number("temp"),
            top_p=number("top_p"),
            top_k=self._metadata.get("general.sampling.top_k", int),
            min_p=number("min_p"),
            repetition_penalty=number("penalty_repeat"),
        )
        return None if defaults == GenerationDefaults() else defaults

    def weights(self) -> Iterator[tuple[str, Source]]:
        """(Hugging Face name, weight) in file order. Nothing but small tensors is read before it is asked for."""
        files = self._open()
        for stored in self._stored:
            file, shape, place = files[stored.path], stored.info.shape, stored.place
            order = row_order(shape[0], place.heads) if place.heads else None
            if stored.kind.decode is not None and len(shape) == 2:
                yield place.name, StoredBlocks.of(file, stored, order)
                continue
            tensor: Source = FileTensor.of(file, stored.kind.dtype, shape, stored.info.offset)
            if len(shape) == 1 or stored.kind.decode is not None or place.undo is not None:
                raw = file.mapped[stored.info.offset : stored.info.offset + stored.num_bytes]
                tensor = dequantize(raw, stored.kind).view(shape)
                tensor = tensor if place.undo is None else place.undo(tensor)
            yield place.name, tensor if order is None else StoredRows(tensor, order)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor | Matrix]]:
        """As `weights`, read. Unquantized tensors are views of the mapped file."""
        return ((name, read(weight)) for name, weight in self.weights())

    def float_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """As `tensors`, but quantized matrices in float32, as transformers has them: what its load_state_dict takes."""
        files = self._open()
        for stored in self._stored:
            raw = files[stored.path].mapped[stored.info.offset : stored.info.offset + stored.num_bytes]
            tensor = dequantize(raw, stored.kind).view(stored.info.shape)
            if stored.place.undo is not None:
                tensor = stored.place.undo(tensor)
            heads = stored.place.heads
            yield stored.place.name, tensor[row_order(len(tensor), heads)] if heads else tensor

    def _open(self) -> dict[Path, OpenFile]:
        return {path: OpenFile(path) for path in dict.fromkeys(stored.path for stored in self._stored)}


def _is_wanted(key: str) -> bool:
    """All but the big arrays nobody asks for here: the tokenizer reads its own."""
    return not key.startswith("tokenizer.ggml.") or not key.endswith((".merges", ".scores"))


def _parts(path: Path) -> list[Path]:
    """The files of a split model, in order; `path` alone if it is whole."""
    match = _SPLIT.search(path.name)
    if match is None:
        return [path]
    number, count = int(match[1]), int(match[2])
    if number != 1:
        raise ConfigError(f"{path} is part {number} of a split model: give the first part.")
    stem = path.name[: match.start()]
    parts = [path.with_name(f"{stem}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise ConfigError(f"{path} is the first of {count} files, but {missing[0]} is not beside it.")
    return parts


def _facts(path: Path, headers: dict[Path, Header]) -> Facts:
    metadata = next(iter(headers.values())).metadata
    infos = {info.name: (part, info) for part, header in headers.items() for info in header.tensors}
    if "token_embd.weight" not in infos:
        raise ConfigError(f"{path} holds no token_embd.weight: it is not a language model, or a part of a split one.")
    factors = {
        name: _numbers(*infos[f"{name}.weight"])
        for name in ("rope_freqs", "rope_factors_long", "rope_factors_short")
        if f"{name}.weight" in infos
    }
    return Facts(
        path=path,
        arch=metadata.require("general.architecture", str),
        metadata=metadata,
        tensor_names=frozenset(infos),
        vocab_size=infos["token_embd.weight"][1].shape[0],
        rope_factors=factors,
    )


def _place_all(headers: dict[Path, Header], facts: Facts) -> tuple[_Stored, ...]:
    """Every tensor of the model. Raises ConfigError for one that is unknown, cannot be decoded, or is cut off."""
    rules, heads, kv_heads = RULES[facts.arch], facts.num_heads, facts.num_kv_heads
    found = []
    for path, header in headers.items():
        for info in sorted(header.tensors, key=lambda info: info.offset):
            if info.name.endswith(IGNORED):
                continue
            place = rules.place(info.name, heads, kv_heads)
            if place is None:
                raise ConfigError(f"{path} holds tensor {info.name!r}, which no {facts.arch} model has.")
            stored = _Stored(path, info, _tensor_type(path, info), place)
            _check_within(path, info, stored.num_bytes)
            found.append(stored)
    return tuple(found)


def _tensor_type(path: Path, info: TensorInfo) -> TensorType:
    kind = TYPES.get(info.type_id)
    if kind is None:
        name = _OTHER_TYPES.get(info.type_id, f"number {info.type_id}")
        supported = ", ".join(known.name for known in TYPES.values())
        raise ConfigError(
            f"{path}: tensor {info.name!r} is of type {name}, which is not supported; supported are {supported}."
        )
    if info.shape[-1] % kind.weights:
        raise ConfigError(f"{path}: tensor {info.name!r} of shape {info.shape} is not whole blocks of {kind.name}.")
    return kind


def _check_within(path: Path, info: TensorInfo, num_bytes: int) -> None:
    if info.offset + num_bytes > path.stat().st_size:
        raise ConfigError(f"{path} is cut off: tensor {info.name!r} lies beyond its end. Download it again.")


def _numbers(path: Path, info: TensorInfo) -> tuple[float, ...]:
    """The values of a small unquantized tensor."""
    kind = _tensor_type(path, info)
    size = kind.num_bytes(math.prod(info.shape))
    _check_within(path, info, size)
    with open(path, "rb") as file:
        file.seek(info.offset)
        raw = file.read(size)
    return tuple(dequantize(torch.frombuffer(bytearray(raw), dtype=torch.uint8), kind).double().tolist())

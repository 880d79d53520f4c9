"""Reads the header of a GGUF file: its metadata and where each tensor lies.

Knows the container (GGUF versions 2 and 3, little endian). Does not know what a key, a name or a tensor type means.
Source: the GGUF specification, github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from octavo.engine.errors import ConfigError

T = TypeVar("T")
Value = int | float | bool | str | Sequence[int | float | bool | str]

_STRING, _ARRAY = 8, 9
_SCALARS = {
    code: struct.Struct("<" + letter)
    for code, letter in {
        0: "B",
        1: "b",
        2: "H",
        3: "h",
        4: "I",
        5: "i",
        6: "f",
        7: "?",
        10: "Q",
        11: "q",
        12: "d",
    }.items()
}
_U32, _U64 = _SCALARS[4], _SCALARS[10]
_MAX_DIMS = 4


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of the file. shape: slowest axis first, as torch has it. offset: bytes from the file's beginning."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int


class Metadata:
    """The key-value pairs of one file, asked for by key and type."""

    def __init__(self, path: Path, values: dict[str, Value]) -> None:
        self.values = values
        self._path = path

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def get(self, key: str, kind: type[T], default: T | None = None) -> T | None:
        """The value, or `default` where the key is absent. int counts as float. Raises ConfigError for another type."""
        value = self.values.get(key)
        if value is None:
            return default
        if kind is float and type(value) is int:
            return kind(value)  # type: ignore[call-arg]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ConfigError(f"{self._path}: metadata {key!r} should be a {kind.__name__}, but is {value!r:.80}.")
        return value

    def require(self, key: str, kind: type[T]) -> T:
        """The value. Raises ConfigError if it is absent or of another type."""
        value = self.get(key, kind)
        if value is None:
            raise ConfigError(f"{self._path} lacks the metadata {key!r}: it is incomplete or not a language model.")
        return value


@dataclass(frozen=True, slots=True)
class Header:
    """What stands before the tensors of one GGUF file."""

    metadata: Metadata
    tensors: tuple[TensorInfo, ...]


def read_header(path: Path, want: Callable[[str], bool] = lambda key: True) -> Header:
    """Metadata whose key `want` accepts, and every tensor's place.

    Unwanted values are stepped over, which matters for vocabularies of 10⁵ strings. Raises ConfigError if the file
    cannot be read, is no GGUF file, or ends within its header.
    """
    try:
        with (
            open(path, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
            memoryview(data) as view,
        ):
            return _Reader(path, view).read(want)
    except OSError as error:
        raise ConfigError(f"Cannot read the GGUF file {path}: {error.strerror or error}.") from error
    except (struct.error, ValueError, KeyError, RecursionError, OverflowError, MemoryError) as error:
        raise ConfigError(f"{path} is not a GGUF file, or it is damaged ({error}).") from error


class _Reader:
    """A position in the header. Raises struct.error, ValueError or KeyError where the bytes make no sense."""

    def __init__(self, path: Path, data: memoryview) -> None:
        self.path = path
        self.data = data
        self.at = 0

    def read(self, want: Callable[[str], bool]) -> Header:
        if bytes(self.data[:4]) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self.at = 4
        version = self.take(_U32)
        if version not in (2, 3):
            order = ": a big-endian file" if version & 0xFFFF == 0 else ""
            raise ValueError(f"GGUF version {version} is not 2 or 3{order}")
        num_tensors, num_values = self.take(_U64), self.take(_U64)
        values: dict[str, Value] = {}
        for _ in range(num_values):
            key, kind = self.string(), self.take(_U32)
            value = self.value(kind, key == "general.alignment" or want(key))
            if value is not None:
                values[key] = value
        found = [self.tensor() for _ in range(num_tensors)]
        alignment = values.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment % 8:
            raise ValueError(f"its alignment is {alignment!r}, not a multiple of 8")
        start = -(-self.at // alignment) * alignment
        tensors = tuple(TensorInfo(name, shape, kind, start + offset) for name, shape, kind, offset in found)
        return Header(Metadata(self.path, values), tensors)

    def take(self, layout: struct.Struct) -> Any:
        (value,) = layout.unpack_from(self.data, self.at)
        self.at += layout.size
        return value

    def string(self) -> str:
        start = self.at + 8
        end = start + self.take(_U64)
        self.move_to(end)
        return str(self.data[start:end], "utf-8", "replace")

    def move_to(self, at: int) -> None:
        if at > len(self.data):
            raise ValueError("it ends within its header")
        self.at = at

    def value(self, kind: int, wanted: bool) -> Any:
        """The value at the position, or None when it is not wanted; moves behind it either way."""
        if kind == _STRING:
            text = self.string()
            return text if wanted else None
        if kind != _ARRAY:
            value = self.take(_SCALARS[kind])
            return value if wanted else None
        kind, count = self.take(_U32), self.take(_U64)
        if kind == _STRING:
            return self.strings(count, wanted)
        if kind == _ARRAY:
            values = [self.value(_ARRAY, wanted) for _ in range(count)]
            return values if wanted else None
        start, size = self.at, _SCALARS[kind].size * count
        self.move_to(start + size)
        return list(struct.unpack_from(f"<{count}{_SCALARS[kind].format[1:]}", self.data, start)) if wanted else None

    def strings(self, count: int, wanted: bool) -> list[str] | None:
        """The hot loop: 10⁵ strings take some tens of milliseconds, so no call per string that is not needed."""
        data, at, length = self.data, self.at, _U64.unpack_from
        found: list[str] = []
        for _ in range(count):
            end = at + 8 + length(data, at)[0]
            if wanted:
                found.append(str(data[at + 8 : end], "utf-8", "replace"))
            at = end
        self.move_to(at)
        return found if wanted else None

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, num_dims = self.string(), self.take(_U32)
        if not 0 < num_dims <= _MAX_DIMS:
            raise ValueError(f"tensor {name!r} has {num_dims} dimensions")
        shape = tuple(self.take(_U64) for _ in range(num_dims))[::-1]
        kind, offset = self.take(_U32), self.take(_U64)
        if offset % 8:
            raise ValueError(f"tensor {name!r} lies at the odd place {offset}")
        return name, shape, kind, offset

"""Reads the key-value header of a GGUF file, and nothing behind it.

Knows the container format (GGUF versions 2 and 3, both byte orders). Does not know what a key means. Vocabularies are
arrays of a hundred thousand strings: fixed-size arrays are unpacked in one call, unwanted ones are stepped over.
Source: the GGUF specification, github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from octavo.engine.errors import ConfigError

_STRING, _ARRAY = 8, 9
# value type → struct code. 7 (bool) is one byte.
_FIXED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def read_metadata(path: Path, want: Callable[[str], bool] = lambda key: True) -> dict[str, Any]:
    """Every key whose name `want` accepts → int, float, bool, str, or a list of these.

    Raises ConfigError if the file cannot be read or is no GGUF file.
    """
    try:
        with (
            open(path, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
            memoryview(data) as view,
        ):
            return _Reader(view).read(want)
    except OSError as error:
        raise ConfigError(f"Cannot read the GGUF file {path}: {error.strerror or error}.") from error
    except (struct.error, ValueError, IndexError, KeyError, RecursionError) as error:
        raise ConfigError(f"{path} is not a GGUF file, or it is damaged ({error}).") from error


class _Reader:
    """A position in a GGUF header. Raises struct.error, ValueError or KeyError where the bytes make no sense."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.at = 0
        self.order = "<"

    def read(self, want: Callable[[str], bool]) -> dict[str, Any]:
        if bytes(self.data[:4]) != b"GGUF":
            raise ValueError("the magic number is missing")
        self.at = 4
        version = self._take("I")
        if version >= 1 << 16:  # the writer had the other byte order
            self.order, self.at = ">", 4
            version = self._take("I")
        if version not in (2, 3):
            raise ValueError(f"GGUF version {version} is not 2 or 3")
        self._take("Q")  # number of tensors
        found: dict[str, Any] = {}
        for _ in range(self._take("Q")):
            key, kind = self._string(), self._take("I")
            value = self._value(kind, want(key))
            if value is not None:
                found[key] = value
        return found

    def _take(self, code: str) -> Any:
        (value,) = struct.unpack_from(self.order + code, self.data, self.at)
        self.at += struct.calcsize(self.order + code)
        return value

    def _string(self) -> str:
        start = self.at + 8
        end = start + self._take("Q")
        if end > len(self.data):
            raise ValueError("a string runs past the end of the file")
        self.at = end
        return str(self.data[start:end], "utf-8", "replace")

    def _value(self, kind: int, wanted: bool) -> Any:
        """The value at the position, or None when not wanted; moves behind it either way."""
        if kind == _STRING:
            text = self._string()
            return text if wanted else None
        if kind == _ARRAY:
            return self._array(self._take("I"), self._take("Q"), wanted)
        value = self._take(_FIXED[kind])
        return value if wanted else None

    def _array(self, kind: int, count: int, wanted: bool) -> list[Any] | None:
        if kind == _STRING:
            return self._strings(count, wanted)
        if kind == _ARRAY:
            values = [self._value(_ARRAY, wanted) for _ in range(count)]
            return values if wanted else None
        code = f"{self.order}{count}{_FIXED[kind]}"
        start, self.at = self.at, self.at + struct.calcsize(code)
        if self.at > len(self.data):
            raise ValueError("an array runs past the end of the file")
        return list(struct.unpack_from(code, self.data, start)) if wanted else None

    def _strings(self, count: int, wanted: bool) -> list[str] | None:
        """The hot loop: 10⁵ strings in some tens of milliseconds, so locals and no calls per string but the needed."""
        data, at, length = self.data, self.at, struct.Struct(self.order + "Q").unpack_from
        strings: list[str] = []
        for _ in range(count):
            end = at + 8 + length(data, at)[0]
            if wanted:
                strings.append(str(data[at + 8 : end], "utf-8", "replace"))
            at = end
        if at > len(data):
            raise ValueError("a string runs past the end of the file")
        self.at = at
        return strings if wanted else None

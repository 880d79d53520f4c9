"""From YAML to typed dataclasses: every key known, every value of its field's type, or a ConfigError naming the key.

Knows dataclasses and YAML. Does not know what the settings mean.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from octavo.engine.errors import ConfigError

T = TypeVar("T")

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def read_yaml(path: Path) -> Mapping[str, Any]:
    """The mapping in a file. Raises ConfigError if it cannot be read or holds no mapping."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{path} is not valid YAML{where}.") from None
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path} must hold a mapping of settings.")
    return values


def parse_bytes(text: str) -> int:
    """`512MiB`, `4GiB`, `1.5G`, `1073741824`: K, M, G, T are powers of 1000, Ki … of 1024. Raises ConfigError."""
    letters = text.strip().lstrip("0123456789.")
    number = text.strip().removesuffix(letters)
    unit = letters.strip().upper().removesuffix("B")
    try:
        return int(float(number) * _UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        raise ConfigError(f"{text!r} is not a size: write 512MiB, 4GiB or a number of bytes.") from None


def section(value: Any, name: str) -> dict[str, Any]:
    """`value` as a mapping from names; nothing at all counts as an empty one."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{name or 'The configuration'} must be a mapping of settings.")
    return dict(value)


def typed(cls: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """An instance of the dataclass `cls`; a field that is a dataclass is read from a mapping in its place."""
    hints = get_type_hints(cls)
    names = [item.name for item in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            raise ConfigError(f"{prefix}{key} is not a setting; there are {', '.join(names)}.")
    return cls(**{key: _value(f"{prefix}{key}", value, hints[key]) for key, value in values.items()})


def optional_of(kind: Any) -> tuple[Any, bool]:
    """(T, True) for `T | None`, else (kind, False)."""
    if get_origin(kind) in (Union, types.UnionType):
        (inner,) = (option for option in get_args(kind) if option is not type(None))
        return inner, True
    return kind, False


def _value(name: str, value: Any, kind: Any) -> Any:
    kind, optional = optional_of(kind)
    if value is None and optional:
        return None
    if dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else typed(kind, section(value, name), f"{name}.")  # type: ignore[arg-type]
    if name.endswith("_bytes") and isinstance(value, str):
        return parse_bytes(value)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ConfigError(f"{name} must be one of {', '.join(get_args(kind))}, got {value!r}.")
        return value
    if get_origin(kind) is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
            raise ConfigError(f"{name} must be a string or a list of strings, got {value!r}.")
        return tuple(items)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        words = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
        raise ConfigError(f"{name} must be {words[kind]}, got {value!r}.")
    return value

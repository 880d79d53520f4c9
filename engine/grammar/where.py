"""Where in a JSON Schema a fault is, by trying its parts: what reports it says what is wrong, but not where."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

TRY_S = 0.5  # for all tries together
_MAPS = ("$defs", "definitions", "properties", "patternProperties", "dependentSchemas")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_SINGLES = ("items", "additionalProperties", "additionalItems", "not", "contains", "if", "then", "else")


def pointer_of_fault(schema: Any, reason: str, reason_of: Callable[[Any], str]) -> str | None:
    """The JSON pointer of the innermost part that by itself has the fault `reason`; None: of none but the whole.

    reason_of: what is wrong with a schema. Parts are tried with the definitions of the whole.
    """
    deadline = time.monotonic() + TRY_S
    shared = {key: schema[key] for key in ("$defs", "definitions") if isinstance(schema, Mapping) and key in schema}
    place, part, found = "", schema, True
    while found:
        found = False
        for name, child in _children(part):
            if time.monotonic() > deadline:
                return place or None
            if isinstance(child, Mapping) and reason_of({**shared, **child}) == reason:
                place, part, found = f"{place}/{name}", child, True
                break
    return place or None


def _children(schema: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(schema, Mapping):
        return
    for key in _MAPS:  # definitions first: what refers to one has its fault
        if isinstance(schema.get(key), Mapping):
            yield from ((f"{key}/{_escaped(name)}", child) for name, child in schema[key].items())
    for key in _LISTS:
        if isinstance(schema.get(key), list):
            yield from ((f"{key}/{index}", child) for index, child in enumerate(schema[key]))
    for key in _SINGLES:
        if isinstance(schema.get(key), Mapping):
            yield key, schema[key]


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")

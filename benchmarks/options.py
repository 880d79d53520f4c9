"""Fields of EngineConfig from the command line: block_size=32 kernels=ref."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from octavo.engine.config import EngineConfig


def engine_options(arguments: Sequence[str]) -> dict[str, Any]:
    """["block_size=32", "kernels=ref"] → {"block_size": 32, "kernels": "ref"}. Raises SystemExit for unknown fields."""
    known = {field.name for field in fields(EngineConfig)}
    found: dict[str, Any] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name not in known or not equals:
            raise SystemExit(f"error: {argument!r} is not FIELD=VALUE of EngineConfig ({', '.join(sorted(known))}).")
        try:
            found[name] = json.loads(value)  # numbers, true, false, null
        except ValueError:
            found[name] = value
    return found

"""PackedInputs: all that a recorded step reads of the host, in one piece of memory, so that one copy brings it.

Knows names, types and places. The same layout is written on the host (numpy) and read on the device (torch).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch

A = TypeVar("A", npt.NDArray[Any], torch.Tensor)

_NUMPY = {"int64": np.int64, "float64": np.float64, "int32": np.int32, "bool": np.bool_}
_TORCH = {"int64": torch.int64, "float64": torch.float64, "int32": torch.int32, "bool": torch.bool}


@dataclass(frozen=True, slots=True)
class PackedInputs(Generic[A]):
    """Of T tokens and R rows, padded. Places are in flat tables: of DeviceBuffers.

    Per token: token_at, the place of its id; positions; table_at, the place of its block; offsets in that block, -1 =
    its KV is not written. Per row: slots; last, index in T of its last token; store_at, where a drawn token goes;
    edit_at, edit_blocks: blocks that tables get first; numbers [6, R], see Draws.numbers; query_start [R + 1];
    context_lens; greedy, rows that take the likeliest token.
    """

    token_at: A
    positions: A
    table_at: A
    offsets: A
    slots: A
    last: A
    store_at: A
    edit_at: A
    numbers: A
    query_start: A
    context_lens: A
    edit_blocks: A
    greedy: A


def _sizes(tokens: int, rows: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """(type, shape) of each field. Wide types come first, so that all are aligned."""
    per_token = (("int64", (tokens,)),) * 4
    per_row = (("int64", (rows,)),) * 4
    numbers = ("float64", (6, rows))
    narrow = (("int32", (rows + 1,)), ("int32", (rows,)), ("int32", (rows,)), ("bool", (rows,)))
    return (*per_token, *per_row, numbers, *narrow)


@cache
def _places(tokens: int, rows: int) -> tuple[tuple[str, tuple[int, ...], slice], ...]:
    """(type, shape, where in the memory) of each field, in their order."""
    places, at = [], 0
    for kind, shape in _sizes(tokens, rows):
        end = at + math.prod(shape) * np.dtype(_NUMPY[kind]).itemsize
        places.append((kind, shape, slice(at, end)))
        at = end
    return tuple(places)


def packed_bytes(tokens: int, rows: int) -> int:
    return int(_places(tokens, rows)[-1][2].stop)


def pack_into(memory: npt.NDArray[np.uint8], tokens: int, rows: int) -> PackedInputs[npt.NDArray[Any]]:
    """Views of memory [packed_bytes(tokens, rows)], to be written."""
    return _views(memory, tokens, rows, _NUMPY)


def unpack(memory: torch.Tensor, tokens: int, rows: int) -> PackedInputs[torch.Tensor]:
    """Views of memory [at least packed_bytes(tokens, rows)] uint8."""
    return _views(memory, tokens, rows, _TORCH)


def _views(memory: Any, tokens: int, rows: int, types: dict[str, Any]) -> PackedInputs[Any]:
    return PackedInputs(
        *(memory[where].view(types[kind]).reshape(shape) for kind, shape, where in _places(tokens, rows))
    )

"""Graphs on a CPU: the native ops of one forward, recorded once, then repeated without Python in between.

A decode step of a small model is some three hundred ops of ten microseconds each; calling them from Python costs as
much as the ops themselves. A graph keeps every op with its arguments, and the memory these point to.

Knows calls and memory. What is recorded is the caller's business: only native ops are seen, so whatever else computes
something in between must not be there (`Recorder` refuses it), and what changes from step to step must be written into
the same input tensors before each replay.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from octavo.kernels.cpu.library import Op
from octavo.kernels.ops import NotRecordable

# What torch may do between native ops: make views, and nothing else. (Memory comes from the arena.)
_VIEWS = frozenset(
    {"view", "_unsafe_view", "slice", "select", "split", "split_with_sizes", "unsqueeze", "squeeze", "t", "transpose"}
    | {"permute", "expand", "alias", "as_strided", "detach", "narrow", "unbind"}
)
_VIEWS_OR_COPIES = frozenset({"reshape", "flatten", "unflatten", "contiguous", "to", "_to_copy"})
_ALIGNMENT = 64


class Arena:
    """Memory that all graphs of a rank share: at any time it holds the tensors of one forward.

    What a recording gives back is handed out again within it, as an allocator would, so that a replay touches little
    memory. A tensor of an earlier recording or replay is overwritten by the next one.
    """

    def __init__(self, size: int) -> None:
        self._memory = np.frombuffer(mmap.mmap(-1, size), dtype=np.uint8)
        self._free: list[tuple[int, int]] = []
        self.reset()

    def reset(self) -> None:
        """Everything is free. What was handed out before is not given back again."""
        self._generation = object()
        self._free = [(0, len(self._memory))]

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """As torch.empty. The memory is given back when the last view of the tensor is gone."""
        size = max(_ALIGNMENT, -(-int(np.prod(shape)) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT)
        for i, (start, length) in enumerate(self._free):
            if length >= size:
                self._free[i : i + 1] = [(start + size, length - size)] if length > size else []
                break
        else:
            raise NotRecordable(f"a forward needs more than {len(self._memory) >> 20} MiB of memory")
        array = self._memory[start : start + size]
        weakref.finalize(array, self._give_back, self._generation, start, size)
        with _disable_current_modes():  # a recorder would take this for a computation
            return torch.from_numpy(array).view(dtype)[: int(np.prod(shape))].view(shape)

    def _give_back(self, generation: object, start: int, size: int) -> None:
        if generation is not self._generation:
            return
        self._free.append((start, size))
        self._free.sort()
        merged: list[tuple[int, int]] = []
        for begin, length in self._free:
            if merged and merged[-1][0] + merged[-1][1] == begin:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((begin, length))
        self._free = merged


class Graph:
    """Recorded calls. `outputs`: what the recorded function returned; overwritten by every replay."""

    def __init__(self, library: ctypes.CDLL, calls: list[tuple[Op, bytes]], outputs: torch.Tensor) -> None:
        self.outputs = outputs
        self._replay = library.octavo_replay
        self._arguments = np.frombuffer(b"".join(arguments for _, arguments in calls), dtype=np.uint64)
        starts = np.cumsum([0, *(len(arguments) for _, arguments in calls[:-1])], dtype=np.uint64)
        addresses = np.array([op.address for op, _ in calls], dtype=np.uint64)
        self._calls = np.stack((addresses, starts + np.uint64(self._arguments.ctypes.data)), axis=1)
        self._address = self._calls.ctypes.data
        self._names = tuple(op.name for op, _ in calls)

    def __len__(self) -> int:
        return len(self._calls)

    def replay(self) -> torch.Tensor:
        self._replay(self._address, len(self._calls), torch.get_num_threads(), None)
        return self.outputs

    def profile(self) -> list[tuple[str, int]]:
        """A replay with the time of every op, in nanoseconds, in order."""
        times = np.zeros(len(self._calls), dtype=np.int64)
        self._replay(self._address, len(self._calls), torch.get_num_threads(), times.ctypes.data)
        return list(zip(self._names, times.tolist(), strict=True))


class Recorder(TorchDispatchMode):
    """While entered: native ops are noted as well as done, and torch may only make views."""

    def __init__(self, arena: Arena) -> None:
        super().__init__()
        self.arena = arena
        self.calls: list[tuple[Op, bytes]] = []

    def add(self, op: Op, arguments: bytes) -> None:
        self.calls.append((op, arguments))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        if name not in _VIEWS and name not in _VIEWS_OR_COPIES:
            raise NotRecordable(f"torch's {name} is not a native op")
        result = func(*args, **(kwargs or {}))
        if name in _VIEWS_OR_COPIES and result.untyped_storage().data_ptr() != args[0].untyped_storage().data_ptr():
            raise NotRecordable(f"torch's {name} copies")
        return result

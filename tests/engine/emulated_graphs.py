"""Recorded steps without a GPU: what a CUDA graph does, done to torch's operations and Triton's launches on a CPU.

A recording notes every operation with the very tensors it reads and writes. A replay does them again on these, whatever
Python would do now: a value that was a Python number while recording stays what it was, a tensor that is not where it
was is not seen. What a capture forbids is an error here too: to read from the device, and to send it host numbers.
"""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor

from octavo.engine.parallel.mesh import Group

# They wait for the device, to know a value or the shape of a result.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "unique_consecutive", "_unique2", "equal", "is_nonzero"}
# They make a tensor of a number on the host, which whatever takes it then sends to the device.
FROM_NUMBERS = {"scalar_tensor", "lift_fresh"}
HOST_NUMBERS = ("from_numpy", "tensor", "as_tensor")


class Waits(AssertionError):
    """An operation that a step may not contain."""


class NoWaits(TorchDispatchMode):
    """While entered: no operation of torch may wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if name_of(func) in WAITING:
            raise Waits(f"{name_of(func)} waits for the device")
        return func(*args, **(kwargs or {}))


class Recorder(NoWaits):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if name_of(func) in FROM_NUMBERS:
            raise Waits(f"a recorded step sends a number to the device: {name_of(func)}")
        result = super().__torch_dispatch__(func, types, args, kwargs)
        outputs = [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
        inputs = {x.untyped_storage().data_ptr() for x in torch.utils._pytree.tree_leaves((args, kwargs)) if _held(x)}
        fresh = [x for x in outputs if _held(x) and x.untyped_storage().data_ptr() not in inputs]
        if fresh or func._schema.is_mutable:
            self.calls.append(lambda: _again(func, args, kwargs or {}, outputs if fresh else []))
        return result


def record(forward: Callable[[], torch.Tensor]) -> tuple["Graph", torch.Tensor]:
    """As octavo.kernels.ops.Record."""
    forward()
    _here.recorder = recorder = Recorder()
    try:
        with recorder:
            outputs = forward()
    finally:
        _here.recorder = None
    graph = Graph(recorder.calls, outputs)
    return graph, graph.replay()


class Graph:
    def __init__(self, calls: list[Callable[[], Any]], outputs: torch.Tensor) -> None:
        self._calls, self._outputs = calls, outputs
        self.replays = 0

    def replay(self) -> torch.Tensor:
        self.replays += 1
        for call in self._calls:
            call()
        return self._outputs


def install(patch: pytest.MonkeyPatch) -> None:
    """Let a recording see what its thread launches in Triton's interpreter, exchanges with other ranks, and sends."""
    launch = GridExecutor.__call__
    numbers = {name: getattr(torch, name) for name in HOST_NUMBERS}

    def noted(self: GridExecutor, *args: Any, **kwargs: Any) -> Any:
        def again() -> Any:
            recorder, _here.recorder = recorder_of(), None  # what the interpreter does is its own affair
            try:
                with _disable_current_modes():
                    return launch(self, *args, **kwargs)
            finally:
                _here.recorder = recorder

        if recorder_of() is not None:
            recorder_of().calls.append(again)
        return again()

    def refusing(name: str) -> Callable[..., Any]:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            if recorder_of() is not None:
                raise Waits("a recorded step is sent numbers of the host")
            return numbers[name](*args, **kwargs)

        return refuse

    def collective(name: str) -> Callable[..., Any]:
        exchange = getattr(Group, name)

        def exchanged(group: Group, x: torch.Tensor) -> torch.Tensor:
            recorder = recorder_of()
            if recorder is None or group.size == 1:
                return exchange(group, x)
            _here.recorder = None
            try:
                with _disable_current_modes():
                    result = exchange(group, x.clone())
            finally:
                _here.recorder = recorder
            recorder.calls.append(lambda: result.copy_(exchange(group, x.clone())))
            return result

        return exchanged

    for name in ("all_reduce", "all_gather"):
        patch.setattr(Group, name, collective(name))
    patch.setattr(Group, "recordable", True)
    patch.setattr(GridExecutor, "__call__", noted)
    for name in HOST_NUMBERS:
        patch.setattr(torch, name, refusing(name))


_here = threading.local()


def recorder_of() -> "Recorder | None":
    return getattr(_here, "recorder", None)


def name_of(func: Any) -> str:
    return str(func.name().partition("::")[2].partition(".")[0])


def _again(func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> None:
    results = torch.utils._pytree.tree_leaves(func(*args, **kwargs))
    if outputs and name_of(func) not in ("empty", "empty_like", "new_empty", "empty_strided"):
        for old, new in zip(outputs, results, strict=True):
            old.copy_(new)


def _held(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.untyped_storage().nbytes() > 0

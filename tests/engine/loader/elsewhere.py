"""A device that is not there: tensors on it hold host tensors, and refuse to meet others, as a GPU's do.

Under `Elsewhere()`, `THERE` works in factories and in `to`. An op of tensors here and there fails, but for copies and
for numbers (tensors without axes), which a GPU takes too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

THERE = torch.device("lazy", 0)  # a device torch knows by name and does not try to start
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class TensorThere(torch.Tensor):
    @staticmethod
    def __new__(cls, held: torch.Tensor) -> TensorThere:
        made: TensorThere = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=THERE,
        )
        return made

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Elsewhere(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    there = any(isinstance(tensor, TensorThere) for tensor in tensors)
    mixed = there and any(not isinstance(tensor, TensorThere) and tensor.dim() for tensor in tensors)
    assert not mixed or func in _COPIES, f"{func} of tensors on two devices"
    device = kwargs.get("device")
    result_there = there if device is None else device.type == THERE.type
    if func == torch.ops.aten.copy_.default:
        result_there = isinstance(args[0], TensorThere)
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    return (
        tree_map(lambda value: TensorThere(value) if isinstance(value, torch.Tensor) else value, result)
        if (result_there)
        else result
    )


def _held(value: Any) -> Any:
    return value.held if isinstance(value, TensorThere) else value

"""Triton's interpreter, made to compute as GPUs do.

By itself it cuts bits off where a GPU rounds to the nearest, ties to even; and it keeps bfloat16 as the integers of its
bits, which some of its operations take for numbers.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

TORCH = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
}
INTEGERS = {1: (torch.uint8, np.uint8), 2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32)}

_convert_float = interpreter._convert_float
_cast, _dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot
_call, _numpy_type = InterpretedFunction.__call__, interpreter._get_np_dtype
_numpy_types: dict[str, Any] = {}
_prepared: set[int] = set()


def convert(data: npt.NDArray[Any], source: tl.dtype, target: tl.dtype, mode: Any) -> npt.NDArray[Any]:
    """As interpreter._convert_float: the bits of `target`, as unsigned integers."""
    if source not in TORCH or target not in TORCH:
        return _convert_float(data, source, target, mode)
    bits, unsigned = INTEGERS[TORCH[target].itemsize]
    numbers = torch.frombuffer(bytearray(data.tobytes()), dtype=TORCH[source]).to(TORCH[target])
    return numbers.view(bits).numpy().view(unsigned).reshape(data.shape)


def cast(self: InterpreterBuilder, source: TensorHandle, target: tl.dtype) -> TensorHandle:
    """Between bfloat16 and what is neither it nor float32: by way of float32."""
    bfloat16, float32 = tl.bfloat16, tl.float32
    if (source.dtype.scalar == bfloat16) != (target.scalar == bfloat16):
        return _cast(self, _cast(self, source, _like(target, float32)), target)
    return _cast(self, source, target)


def dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
    return _dot(self, _as_numbers(self, a), _as_numbers(self, b), *rest)


def call(self: InterpretedFunction[Any], *args: Any, **kwargs: Any) -> Any:
    """A function that a kernel calls. It prepares the functions of its module once, not in every call."""
    if id(self.fn.__globals__) in _prepared:
        return self.rewrite()(*args, **kwargs)
    _prepared.add(id(self.fn.__globals__))
    return _call(self, *args, **kwargs)


def numpy_type(of: tl.dtype) -> Any:
    """As interpreter._get_np_dtype, which builds its table anew every time."""
    if of.scalar.name not in _numpy_types:
        _numpy_types[of.scalar.name] = _numpy_type(of)
    return _numpy_types[of.scalar.name]


def _as_numbers(builder: InterpreterBuilder, x: TensorHandle) -> TensorHandle:
    return _cast(builder, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x


def _like(shaped: tl.dtype, scalar: tl.dtype) -> tl.dtype:
    return tl.block_type(scalar, shaped.shape) if isinstance(shaped, tl.block_type) else scalar


def mend() -> None:
    """In this process."""
    interpreter._convert_float = convert
    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast, dot
    InterpretedFunction.__call__, interpreter._get_np_dtype = call, numpy_type  # a third of the time


@pytest.fixture(autouse=True, scope="session")
def exact() -> Iterator[None]:
    mend()
    yield
    interpreter._convert_float = _convert_float
    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = _cast, _dot
    InterpretedFunction.__call__, interpreter._get_np_dtype = _call, _numpy_type

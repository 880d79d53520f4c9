"""Triton's interpreter, made to round as GPUs do: to the nearest, ties to even. (By itself it cuts bits off.)"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

TORCH = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
}
INTEGERS = {1: (torch.uint8, np.uint8), 2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32)}


@pytest.fixture(autouse=True, scope="session")
def rounding() -> Iterator[None]:
    before = interpreter._convert_float

    def convert(data: npt.NDArray[Any], source: tl.dtype, target: tl.dtype, mode: Any) -> npt.NDArray[Any]:
        if source not in TORCH or target not in TORCH:
            return before(data, source, target, mode)
        bits, unsigned = INTEGERS[TORCH[target].itemsize]
        numbers = torch.frombuffer(bytearray(data.tobytes()), dtype=TORCH[source]).to(TORCH[target])
        return numbers.view(bits).numpy().view(unsigned).reshape(data.shape)

    interpreter._convert_float = convert
    yield
    interpreter._convert_float = before

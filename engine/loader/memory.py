"""Gives freed memory back to the system. Knows the C library and the device, not what was freed."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch


def give_back() -> None:
    """Where the C library is glibc: it keeps blocks of up to 32 MiB for itself, which at the end of loading is a fifth
    of a small model. A call takes well under a millisecond, and more where there is much to give back."""
    _trim()(0)


def give_back_device(device: torch.device) -> None:
    """What torch keeps of a GPU's memory for later, once all work that was asked for is done, so that whoever asks what
    is free learns of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


@functools.cache
def _trim() -> Callable[[int], Any]:
    try:
        return ctypes.CDLL(None).malloc_trim  # type: ignore[no-any-return]
    except (AttributeError, OSError, TypeError):  # another C library
        return lambda keep: None

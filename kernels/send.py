"""Numbers of the host on their way to a device, without a wait."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch


def send(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """The array on the device. On CUDA the copy is queued from pinned memory, which torch keeps until it is done; on a
    CPU the tensor is the array."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def send_into(out: torch.Tensor, array: npt.NDArray[Any]) -> None:
    """Copy the array into `out`, of the same shape and dtype, as `send` does."""
    tensor = torch.from_numpy(array)
    out.copy_(tensor.pin_memory() if out.device.type == "cuda" else tensor, non_blocking=True)

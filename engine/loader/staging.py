"""The way of bytes from files to a device: through pinned buffers, by copies nobody waits for.

Knows the device's streams and memory, neither files nor tensors' meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

Sent = Any  # a copy that was asked for: its staging's own affair


class Staging(Protocol):
    """All but `receive` and `close` may be called from any thread."""

    def empty(self, num_bytes: int) -> torch.Tensor:
        """[num_bytes] uint8 on the device, for `send` to fill."""
        ...

    def buffer(self, num_bytes: int) -> torch.Tensor:
        """[num_bytes] uint8 on the host, for `send` to read."""
        ...

    def send(self, buffer: torch.Tensor, out: torch.Tensor) -> Sent:
        """Ask for a copy into `out`, part of what `empty` gave. The buffer must stay as it is until that is done."""
        ...

    def wait(self, sent: Sent) -> None:
        """Until the copy is done."""
        ...

    def receive(self, tensor: torch.Tensor, sent: Sequence[Sent]) -> None:
        """What the calling thread asks of the device from now on sees the tensor as those copies left it. Does not
        wait; nor does whoever drops the tensor later."""
        ...

    def close(self) -> None:
        """Waits for what was asked for."""
        ...


def staging_of(device: torch.device) -> Staging | None:
    """None: the device has the host's memory."""
    return CudaStaging(device) if device.type == "cuda" else None


class CudaStaging:
    """Copies on a stream of their own, beside what the loading thread computes.

    What arrives was allocated on that stream; `record_stream` keeps the allocator from giving its memory to the next
    arrival while the loading thread's stream still reads it. A device without a number is the constructing thread's
    current one, which other threads would not have.
    """

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", index)
        self._stream = torch.cuda.Stream(self._device)

    def empty(self, num_bytes: int) -> torch.Tensor:
        with torch.cuda.stream(self._stream):
            return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def buffer(self, num_bytes: int) -> torch.Tensor:
        with torch.cuda.device(self._device):
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def send(self, buffer: torch.Tensor, out: torch.Tensor) -> torch.cuda.Event:
        with torch.cuda.stream(self._stream):
            out.copy_(buffer, non_blocking=True)
            sent = torch.cuda.Event(blocking=True)  # who waits sleeps, so that its core reads on
            sent.record(self._stream)
        return sent

    def wait(self, sent: torch.cuda.Event) -> None:
        sent.synchronize()

    def receive(self, tensor: torch.Tensor, sent: Sequence[torch.cuda.Event]) -> None:
        stream = torch.cuda.current_stream(self._device)
        for event in sent:
            stream.wait_event(event)
        tensor.record_stream(stream)

    def close(self) -> None:
        self._stream.synchronize()

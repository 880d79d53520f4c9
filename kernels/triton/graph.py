"""CUDA graphs: what a function launches, recorded once, then replayed by one call of the host.

Knows streams and CUDA's capture. What is recorded is the caller's business: it must wait for nothing, take its inputs
from tensors that stay where they are, and do the same when it is called again with the same inputs.

All graphs share one pool of memory, since only one runs at a time: what a graph returns is overwritten by the next
replay of any. A graph that is dropped gives its memory back to the pool.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from octavo.kernels.ops import NotRecordable


class Graph:
    """outputs: what the recorded function returned; overwritten by every replay."""

    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: torch.Tensor) -> None:
        self._graph, self._outputs = graph, outputs

    def replay(self) -> torch.Tensor:
        self._graph.replay()
        return self._outputs


def record(forward: Callable[[], torch.Tensor]) -> tuple[Graph, torch.Tensor]:
    """See `octavo.kernels.ops.Record`. Calls `forward` twice: kernels are compiled and libraries set up in the first
    call, which a capture does not allow; the second is captured, and then replayed.
    """
    if not torch.cuda.is_available():
        raise NotRecordable("there is no CUDA device")
    pool, stream = _shared(torch.cuda.current_device())
    current = torch.cuda.current_stream()
    stream.wait_stream(current)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        forward()
        # Other threads of this process go on using CUDA meanwhile: they wait for events, and pin memory.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            try:
                outputs = forward()
            finally:
                graph.capture_end()
        except RuntimeError as error:  # an operation that cannot be captured, or no memory for it
            raise NotRecordable(str(error)) from error
    current.wait_stream(stream)
    captured = Graph(graph, outputs)
    return captured, captured.replay()


@cache
def _shared(device: int) -> tuple[Any, torch.cuda.Stream]:
    """The pool of a device's graphs, and the stream that all are captured on."""
    return torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

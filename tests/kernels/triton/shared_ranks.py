"""Ranks that are processes of this machine and share memory, each with Triton's interpreter: for kernels that read one
another's memory.

Programs of a rank run one after the other, ranks at the same time. Processes are forked from one that has imported all.
"""

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch
from triton.runtime.interpreter import InterpreterBuilder

sys.path.insert(0, str(Path(__file__).parent))
from conftest import mend

from octavo.kernels.triton import allreduce
from octavo.kernels.triton.allreduce import Peers, buffer_bytes

PATIENCE_S = 60
# What takes long to import. No module of the tests: the server of forks does not have their paths.
PRELOAD = ["sympy", "torch.testing", "torch.distributed", "triton.runtime.interpreter", "octavo.engine.runner.build"]


class PAUSE:
    """seconds: that this rank does nothing after it has read a signal."""

    seconds = 0.0002


@contextmanager
def shared_files(size: int, part_bytes: int) -> Iterator[list[str]]:
    """A file per rank, mapped by all, and one with the calls of all."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        files = [f"{folder}/{rank}" for rank in range(size)]
        for file in files:
            with open(file, "wb") as out:
                out.truncate(buffer_bytes(part_bytes))
        yield files


def map_peers(rank: int, files: list[str], part_bytes: int) -> tuple[Peers, list[torch.Tensor]]:
    """What a rank sees of the files; and the mappings, which must live as long."""
    size = buffer_bytes(part_bytes)
    buffers = [torch.from_file(file, shared=True, size=size, dtype=torch.uint8) for file in files]
    addresses = torch.tensor([buffer.data_ptr() for buffer in buffers])
    calls = torch.zeros(allreduce.PROGRAMS, dtype=torch.int32)
    return Peers(rank, len(files), addresses, calls, part_bytes), buffers


def interpret_alone() -> None:
    """For a process that runs kernels beside others. When it has read a signal, it leaves them the processor."""
    mend()
    torch.set_num_threads(1)
    load = InterpreterBuilder.create_masked_load

    def patient(*args: Any) -> Any:
        loaded = load(*args)
        if args[-1] is True:  # volatile
            time.sleep(PAUSE.seconds)
        return loaded

    InterpreterBuilder.create_masked_load = patient


def forks() -> BaseContext:
    """Processes that need not import what takes long."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def on_ranks(size: int, part_bytes: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """work(peers, *args) of every rank, in rank order. Its module is imported by its name. Raises the first error."""
    context = forks()
    with shared_files(size, part_bytes) as files:
        pipes = [context.Pipe(duplex=False) for _ in range(size)]
        ranks = [
            context.Process(target=_rank, args=(sending, rank, files, part_bytes, work, args), daemon=True)
            for rank, (_, sending) in enumerate(pipes)
        ]
        try:
            for rank in ranks:
                rank.start()
            return _results([receiving for receiving, _ in pipes])
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()


def _rank(
    answer: Connection, rank: int, files: list[str], part_bytes: int, work: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    interpret_alone()
    try:
        peers, _mappings = map_peers(rank, files, part_bytes)
        answer.send((True, work(peers, *args)))
    except BaseException:
        answer.send((False, traceback.format_exc()))


def _results(pipes: list[Connection]) -> list[Any]:
    """An error at once: who failed is waited for by the others."""
    results: dict[Connection, Any] = {}
    while len(results) < len(pipes):
        ready = wait([pipe for pipe in pipes if pipe not in results], PATIENCE_S)
        assert ready, "ranks wait without end"
        for pipe in ready:
            fine, results[pipe] = pipe.recv()
            assert fine, results[pipe]
    return [results[pipe] for pipe in pipes]

"""Runs a function on every rank of a layout: ranks are threads, what travels between them goes through real gloo."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from octavo.engine.parallel.connect import HostedRendezvous, connect
from octavo.engine.parallel.layout import Layout
from octavo.engine.parallel.mesh import Mesh

T = TypeVar("T")
CPU = torch.device("cpu")


def on_ranks(layout: Layout, work: Callable[[Mesh], T], step_timeout_s: float = 60.0) -> list[T]:
    """work(mesh) of every rank, in rank order. The first rank's error is raised, when all have ended."""
    hosted = HostedRendezvous("127.0.0.1", timeout_s=60.0, step_timeout_s=step_timeout_s)

    def rank(index: int) -> T:
        mesh = connect(layout, index, hosted.rendezvous, CPU)
        try:
            return work(mesh)
        finally:
            mesh.close()

    try:
        with ThreadPoolExecutor(layout.size) as pool:
            futures = [pool.submit(rank, index) for index in range(layout.size)]
            return [future.result() for future in futures]
    finally:
        hosted.close()


def unconnected(layout: Layout, rank: int) -> Mesh:
    """The mesh of a rank that only builds: any collective raises."""
    stage, tp_rank = layout.place(rank)
    mesh = Mesh()
    tp = dataclasses.replace(mesh.tp, rank=tp_rank, size=layout.tp)
    return dataclasses.replace(mesh, tp=tp, pp=dataclasses.replace(mesh.pp, rank=stage, size=layout.pp))

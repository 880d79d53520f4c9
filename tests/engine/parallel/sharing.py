"""Ranks that are processes with Triton's interpreter, and add up over memory that they share."""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "kernels" / "triton"))
from launchers import Processes
from shared_ranks import forks, interpret_alone, map_peers, shared_files

from octavo.engine.parallel.mesh import Mesh
from octavo.engine.parallel.symmetric import Limits, SymmetricLink
from octavo.engine.process.rank import RankSpec, run_rank
from octavo.engine.runner import build
from octavo.kernels.triton import allreduce

__all__ = ["Sharing", "shared_files"]


class Sharing(Processes):
    """files: one per rank, of its memory. done: rank 0 adds a letter to it for each sum: o, t, n (with the norm)."""

    def __init__(self, files: list[str], part_bytes: int, done: Path) -> None:
        super().__init__()
        self._shared = files, part_bytes, str(done)

    def start(self, specs: Sequence[RankSpec]) -> None:
        for spec in specs:
            self.processes[spec.rank] = forks().Process(target=_run, args=(spec, *self._shared), daemon=True)
            self.processes[spec.rank].start()


def _run(spec: RankSpec, files: list[str], part_bytes: int, done: str) -> None:
    interpret_alone()
    allreduce.PROGRAMS = 4
    connect = build.connect

    def connect_shared(*args: Any, **options: Any) -> Mesh:
        mesh = connect(*args, **options)
        peers, memory = map_peers(spec.rank, files, part_bytes)
        link = SymmetricLink(mesh.tp.link, peers, Limits(512, part_bytes * allreduce.PROGRAMS), memory)
        return replace(mesh, tp=replace(mesh.tp, link=link))

    build.connect = connect_shared
    if spec.rank == 0:
        for letter, name in (("o", "one_shot"), ("t", "two_shot"), ("n", "sum_add_rms_norm")):
            setattr(allreduce, name, _noted(getattr(allreduce, name), letter, done))
    run_rank(spec, "here", None, os._exit, False)


def _noted(body: Any, letter: str, done: str) -> Any:
    def noted(x: torch.Tensor, *rest: Any) -> Any:
        with open(done, "a") as out:
            out.write(letter)
        return body(x, *rest)

    return noted

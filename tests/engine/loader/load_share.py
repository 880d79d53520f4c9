"""One rank loads its part of a checkpoint and prints bytes: python load_share.py FOLDER TP PP RANK QUANTIZATION

Prints what the finished part takes and the most anonymous memory the process took on the way to it, beyond what it took
before. (Pages of mapped files are not counted: they are the system's to take back.) A process of its own: what other
loads left behind would be reused.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from pathlib import Path

import torch

from octavo.engine.layers.context import BuildContext
from octavo.engine.loader.assign import load_weights
from octavo.engine.loader.folder import open_folder
from octavo.engine.models.registry import build_model
from octavo.engine.parallel.layout import Layout
from octavo.engine.parallel.mesh import Mesh
from octavo.engine.quant.methods import choose_methods
from octavo.kernels import ops

INTERVAL_S = 0.0005


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon")


def main(folder: str, tp: str, pp: str, rank: str, quantization: str) -> None:
    torch.set_num_threads(1)
    stage, tp_rank = Layout(int(tp), int(pp)).place(int(rank))
    mesh = Mesh()
    mesh = replace(
        mesh,
        tp=replace(mesh.tp, rank=tp_rank, size=int(tp)),
        pp=replace(mesh.pp, rank=stage, size=int(pp)),
    )
    chosen = ops.select(torch.device("cpu"), torch.bfloat16)
    methods = choose_methods(quantization, True, None, chosen)
    context = BuildContext(
        mesh,
        chosen,
        torch.bfloat16,
        torch.device("cpu"),
        linear_method=methods.linear,
        head_method=methods.head,
        table_method=methods.table,
    )
    checkpoint = open_folder(Path(folder), False)
    model = build_model(checkpoint.config, context)
    torch.zeros(8, 8).to(torch.bfloat16)  # what torch sets up on first use
    done, peak, before = threading.Event(), [0], anonymous_bytes()

    def watch() -> None:
        while not done.wait(INTERVAL_S):
            peak[0] = max(peak[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    load_weights(model, checkpoint.weights())
    done.set()
    watcher.join()
    after = anonymous_bytes()
    print(after - before, max(peak[0], after) - before)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Sums over the GPUs of this node: over shared memory and with NCCL, alone and with the norm that comes next.

    python benchmarks/allreduce.py [--ranks 8] [--width 4096]

Starts a process per GPU, each of which sees its own GPU alone, as an engine's ranks do. First every way to add up is
checked: the sum in rank order, bit for bit, called and replayed from a CUDA graph with new numbers. Then the time of a
call in a graph of many, the slowest rank's median; beside it the floor: what a rank must read of the others at least,
2 (n - 1) / n of the tensor, ÷ the rate of a copy from a neighbour's memory.

--interpret: the checks alone, without a GPU, in Triton's interpreter; on few and small tensors.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
CALLS, REPLAYS = 20, 15  # in a graph; of it
EPS = 1e-5


def main() -> None:
    args = arguments()
    if args.rank is None:
        start(args)
        return
    import torch

    if args.interpret:
        torch.set_num_threads(1)
    work = Work(args)
    check(work)
    work.say(f"checked on {args.ranks} ranks: {', '.join((*work.bodies, *({'fused'} & work.norms.keys())))}")
    if not args.interpret:
        measure(work, args)
    work.link.close()


def start(args: argparse.Namespace) -> None:
    """Be the one that starts the ranks, and ends when they have."""
    import torch

    from octavo.engine.parallel.connect import HostedRendezvous

    if args.ranks is None:
        args.ranks = 2 if args.interpret else torch.cuda.device_count()
    if args.ranks < 2:
        raise SystemExit("This takes at least two GPUs; --interpret runs the checks without any.")
    hosted = HostedRendezvous("127.0.0.1")
    with tempfile.TemporaryDirectory(
        dir="/dev/shm" if args.interpret and os.path.isdir("/dev/shm") else None
    ) as folder:
        command = [sys.executable, __file__, *sys.argv[1:], "--ranks", str(args.ranks), "--folder", folder]
        command += ["--port", str(hosted.rendezvous.port)]
        ranks = []
        for rank in range(args.ranks):
            own = {"TRITON_INTERPRET": "1"} if args.interpret else {"CUDA_VISIBLE_DEVICES": visible(rank)}
            ranks.append(subprocess.Popen([*command, "--rank", str(rank)], env=os.environ | own))
        try:
            for each in ranks:
                if each.wait(timeout=args.timeout):
                    raise SystemExit("A rank failed: see above.")
        except subprocess.TimeoutExpired:
            raise SystemExit(f"The ranks were not done within {args.timeout:g} s.") from None
        finally:
            for each in ranks:
                each.kill()


def visible(rank: int) -> str:
    """The rank's GPU, of those that this process may see."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",")[rank] if given else str(rank)


class Work:
    """A rank: its link, and the ways it can add up. norms: those that add a residual and take the norm as well."""

    def __init__(self, args: argparse.Namespace) -> None:
        import logging

        import torch

        from octavo.engine.parallel.connect import Rendezvous, connect
        from octavo.engine.parallel.layout import Layout
        from octavo.engine.parallel.symmetric import SymmetricLink
        from octavo.kernels.triton import add_rms_norm, allreduce

        logging.basicConfig(level=logging.INFO, format="%(message)s")
        self.rank, self.size = args.rank, args.ranks
        self.device = torch.device("cpu" if args.interpret else "cuda:0")
        # The interpreter does not round to bfloat16 as GPUs do.
        self.dtypes = (torch.float32,) if args.interpret else (torch.bfloat16, torch.float16, torch.float32)
        self.rows = (1, 3) if args.interpret else ROWS
        self.width = 1032 if args.interpret else args.width
        mesh = connect(Layout(args.ranks), args.rank, Rendezvous("127.0.0.1", args.port), self.device)
        self.link: Any = mesh.tp.link
        if args.interpret:
            self.link = share_files(self.link, Path(args.folder))
        self.library = self.link.below if isinstance(self.link, SymmetricLink) else self.link
        self.bodies: dict[str, Callable[..., Any]] = {}
        self.norms: dict[str, Callable[..., Any]] = {}
        if isinstance(self.link, SymmetricLink):
            peers = self.link.peers
            self.fits, self.rows_fit = partial(allreduce.fits, peers=peers), partial(allreduce.rows_fit, peers=peers)
            self.bodies = {
                "one-shot": partial(allreduce.one_shot, peers=peers),
                "two-shot": partial(allreduce.two_shot, peers=peers),
            }
            self.norms["fused"] = partial(allreduce.sum_add_rms_norm, peers=peers)
            self.norms["one-shot, norm"] = lambda x, *rest: add_rms_norm(self.bodies["one-shot"](x), *rest)
        if not args.interpret:
            self.norms["NCCL, norm"] = lambda x, *rest: add_rms_norm(self.library.all_reduce(x), *rest)

    def say(self, *words: Any) -> None:
        if self.rank == 0:
            print(*words, flush=True)

    def part(self, rank: int, rows: int, dtype: Any, seed: int) -> Any:
        import torch

        made = torch.Generator().manual_seed(1000 * seed + rank)
        return torch.randn(rows, self.width, generator=made).to(self.device, dtype)

    def slowest(self, seconds: float) -> float:
        """The largest of the ranks'."""
        import torch

        mine = torch.tensor([seconds], dtype=torch.float64, device=self.device)
        return float(self.library.all_gather(mine).max())


def share_files(link: Any, folder: Path) -> Any:
    """A link over files that all ranks map, in place of GPUs' memory."""
    import torch

    from octavo.engine.parallel.symmetric import LIMITS, PART_BYTES, SymmetricLink
    from octavo.kernels.triton.allreduce import PROGRAMS, Peers, buffer_bytes

    size = buffer_bytes(PART_BYTES)
    if link.rank == 0:
        for rank in range(link.size):
            with (folder / str(rank)).open("wb") as file:
                file.truncate(size)
    link.all_reduce(torch.zeros(1))  # the files are there
    files = [str(folder / str(rank)) for rank in range(link.size)]
    buffers = [torch.from_file(file, shared=True, size=size, dtype=torch.uint8) for file in files]
    addresses = torch.tensor([buffer.data_ptr() for buffer in buffers])
    peers = Peers(link.rank, link.size, addresses, torch.zeros(PROGRAMS, dtype=torch.int32), PART_BYTES)
    return SymmetricLink(link, peers, LIMITS[link.size], buffers)


def check(work: Work) -> None:
    """Raises AssertionError where a result is not what the definition says."""
    import torch

    from octavo.kernels import ref

    for seed, (rows, dtype) in enumerate((rows, dtype) for rows in work.rows for dtype in work.dtypes):
        parts = [work.part(rank, rows, dtype, seed) for rank in range(work.size)]
        want = parts[0].float()
        for part in parts[1:]:
            want = want + part.float()
        want = want.to(dtype)
        x = parts[work.rank].contiguous()
        for name, body in work.bodies.items():
            if work.fits(x):
                assert torch.equal(body(x.clone()), want), (name, rows, dtype, "differs from the sum in rank order")
                assert work.device.type == "cpu" or replays(body, parts, work.rank, want), (name, rows, dtype, "graph")
        library = work.library.all_reduce(x.clone())
        torch.testing.assert_close(library, want, rtol=2e-2, atol=5e-2)
        if "fused" in work.norms and work.rows_fit(x):
            residual, weight = work.part(99, rows, dtype, seed), work.part(100, 1, dtype, seed)[0].contiguous()
            want_norm, want_sum = ref.add_rms_norm(want, residual, weight, EPS)
            norm, total = work.norms["fused"](x.clone(), residual.clone(), weight, EPS)
            assert torch.equal(total, want_sum), ("fused", rows, dtype, "another sum")
            torch.testing.assert_close(norm, want_norm, rtol=1e-2, atol=1e-2)


def replays(body: Callable[..., Any], parts: list[Any], rank: int, want: Any) -> bool:
    """Whether a graph of two calls gives the sums of what it finds, three times, other numbers each time."""
    import torch

    x = parts[rank].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL has threads of its own
        twice = [body(x), body(x)]
    right = True
    for times in (1, 2, 4):  # powers of two: sums are multiples, bit for bit
        x.copy_(parts[rank] * times)
        graph.replay()
        right = right and all(torch.equal(found, want * times) for found in twice)
    return right


@dataclass(frozen=True)
class Line:
    """Microseconds. None: no room for so much."""

    rows: int
    bytes: int
    floor: float | None
    times: dict[str, float | None]


def measure(work: Work, args: argparse.Namespace) -> None:
    import torch

    rate = peer_rate(work)
    lines: list[Line] = []
    for rows in work.rows:
        x = torch.zeros(rows, work.width, dtype=torch.bfloat16, device=work.device)
        residual, weight = torch.zeros_like(x), torch.ones(work.width, dtype=x.dtype, device=work.device)
        times: dict[str, float | None] = {}
        for name, body in work.bodies.items():
            times[name] = timed(work, partial(body, x)) if work.fits(x) else None
        times["NCCL"] = timed(work, partial(work.library.all_reduce, x))
        for name, body in work.norms.items():
            room = name != "fused" or work.rows_fit(x)
            room = room and (name != "one-shot, norm" or work.fits(x))
            times[name] = timed(work, partial(body, x, residual, weight, EPS)) if room else None
        floor = 2 * (work.size - 1) / work.size * x.nbytes / rate * 1e6 if rate else None
        lines.append(Line(rows, x.nbytes, floor, times))
    if work.rank == 0:
        report(lines, rate, args)


def timed(work: Work, call: Callable[[], Any]) -> float:
    """Microseconds of a call."""
    import torch

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL has threads of its own
        for _ in range(CALLS):
            call()
    seconds: list[float] = []
    for _ in range(REPLAYS + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        work.library.all_reduce(torch.zeros(1, device=work.device))  # ranks begin together
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3 / CALLS)
    return work.slowest(median(seconds[3:])) * 1e6


def peer_rate(work: Work) -> float | None:
    """Bytes/s of a copy from the next rank's memory, while all ranks copy. None without shared memory."""
    import torch

    if not work.bodies:
        return None
    buffer, handle, *_ = work.link.memory
    theirs = handle.get_buffer((work.rank + 1) % work.size, (buffer.numel(),), torch.uint8)
    mine = torch.empty_like(buffer)
    return buffer.nbytes / timed(work, partial(mine.copy_, theirs)) * 1e6


def report(lines: list[Line], rate: float | None, args: argparse.Namespace) -> None:
    from report import save, show, table

    names = list(lines[0].times)
    shown = table(("rows", "KiB", "floor", *names), left=0)
    for line in lines:
        cells = (f"{line.rows}", f"{line.bytes / 1024:g}", number(line.floor))
        shown.add_row(*cells, *(number(line.times[name]) for name in names))
    from_a_neighbour = f", {rate / 1e9:.0f} GB/s from a neighbour's memory" if rate else ""
    show(f"{args.ranks} GPUs, bfloat16, rows of {args.width}: µs{from_a_neighbour}", shown)
    results = {"rate": rate, "lines": [{**vars(line)} for line in lines]}
    save("allreduce", {"ranks": args.ranks, "width": args.width}, results, args.output)


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, help="default: all GPUs, or 2 with --interpret")
    parser.add_argument("--width", type=int, default=4096, help="of a row, in elements")
    parser.add_argument("--interpret", action="store_true", help="checks alone, without a GPU")
    parser.add_argument("--output", type=Path, help="where to write the JSON file")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for all of it")
    for name, kind in (("--rank", int), ("--port", int), ("--folder", str)):  # given to the ranks that are started
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
